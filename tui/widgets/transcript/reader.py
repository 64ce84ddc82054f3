"""Reading the blocks: a cursor over them, folding, finding, selecting, and requests to the screen.

A request is a posted message, which the screen that holds the widget handles.
"""

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.events import Blur, Click, Focus
from textual.selection import Selection
from textual.strip import Strip

from ...text.markdown import Line
from ...text.markdown.lines import copied
from ...text.markdown.table import FIRST, TABLE
from ...text.sanitise import cells
from .blocks import Block
from .find import Finder, Mark, Match
from .messages import (
    CopyRequested,
    EditRequested,
    FindRequested,
    ForkRequested,
    MenuRequested,
    RetryRequested,
    SiblingRequested,
    TablesRequested,
)
from .paint import barred, beside, over
from .scroll import BlockView, Place

_ASKED = {"edit": EditRequested, "retry": RetryRequested, "fork": ForkRequested, "menu": MenuRequested}


class Reader(BlockView):
    """A view of blocks to read in; its keys work while it has the focus."""

    ALLOW_SELECT = True
    FOCUS_ON_CLICK = False  # the prompt keeps the focus, for what is typed next
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "step(-1)", "previous", show=False, id="transcript.previous"),
        Binding("down,j", "step(1)", "next", show=False, id="transcript.next"),
        Binding("c", "copy", "copy", show=False, id="transcript.copy"),
        Binding("y", "copy_code", "copy code", show=False, id="transcript.copy_code"),
        Binding("t", "tables", "tables", show=False, id="transcript.tables"),
        Binding("e", "ask('edit')", "edit", show=False, id="transcript.edit"),
        Binding("r", "ask('retry')", "retry", show=False, id="transcript.retry"),
        Binding("f", "ask('fork')", "fork", show=False, id="transcript.fork"),
        Binding("left", "sibling(-1)", "other answer", show=False, id="transcript.sibling_previous"),
        Binding("right", "sibling(1)", "other answer", show=False, id="transcript.sibling_next"),
        Binding("space", "fold", "fold", show=False, id="transcript.fold"),
        Binding("enter", "ask('menu')", "menu", show=False, id="transcript.menu"),
        Binding("slash", "find", "find", show=False, id="transcript.find"),
    ]

    def __init__(self, measure: int, id: str | None) -> None:
        super().__init__(measure, id)
        self._cursor: Block | None = None
        self._codes_copied = 0
        self._finder = Finder()
        self._matches: list[Match] | None = None
        self._marks: dict[Block, list[Mark]] = {}

    # the cursor

    @property
    def cursor(self) -> Block | None:
        """The block that keys act on: the chosen one, else the last one in sight."""
        if self._cursor is None or self._cursor not in self.blocks:
            self._choose_in_sight()
        return self._cursor

    def _choose_in_sight(self) -> None:
        if self._cursor is None or not self._in_sight(self._cursor):
            place = self._place_at(self.scroll_offset.y + self._height - 2)
            self._cursor = place[0] if place else None

    def on_focus(self, _: Focus) -> None:
        self._choose_in_sight()
        self.refresh()

    def on_blur(self, _: Blur) -> None:
        self.refresh()

    def _in_sight(self, block: Block) -> bool:
        if block not in self.blocks:
            return False
        top, bottom = self._edges(block)
        return top < self.scroll_offset.y + self._height and bottom > self.scroll_offset.y

    def _settle(self, place: Place | None) -> None:
        super()._settle(place)
        if self.has_focus and (self._cursor is None or self._cursor not in self.blocks):
            self._choose_in_sight()

    def _edges(self, block: Block) -> tuple[int, int]:
        """Return the block's first row and the row after its last one with text."""
        index = self.index(block)
        return self._rows.top(index), self._rows.top(index) + self._rows.height(index) - 1

    def action_step(self, step: int) -> None:
        """Go to the next block, after scrolling through one that is taller than the screen."""
        self._choose_in_sight()
        block = self._cursor
        if block is None:
            return
        top, bottom = self._edges(block)
        page, y = self._height, self.scroll_offset.y
        if step > 0 and bottom > y + page:
            self.go_to(block, min(y - top + page // 2, bottom - page - top))
        elif step < 0 and top < y:
            self.go_to(block, max(y - top - page // 2, 0))
        else:
            self._move_to(self.index(block) + step)

    def _move_to(self, index: int) -> None:
        if not 0 <= index < len(self.blocks):
            return
        block = self.blocks[index]
        self._cursor, self._codes_copied = block, 0
        self._measure_block(index)
        top, bottom = self._edges(block)
        free = self._height - (bottom - top)
        if top < self.scroll_offset.y:
            self.go_to(block, max(-free, 0))
        elif bottom > self.scroll_offset.y + self._height:
            self.go_to(block, min(-free, 0))
        self.refresh()

    # requests

    def action_copy(self) -> None:
        if self.cursor is not None:
            self.post_message(CopyRequested(self.cursor.text, self.cursor.name))

    def action_copy_code(self) -> None:
        """Copy the block's code; pressed again, its next one."""
        codes = self.cursor.codes() if self.cursor is not None else []
        if codes:
            number = self._codes_copied % len(codes)
            self._codes_copied += 1
            self._copy_code(codes[number].text, number, len(codes))

    def _copy_code(self, text: str, number: int, count: int) -> None:
        self.post_message(CopyRequested(text, f"code {number + 1} of {count}" if count > 1 else "code"))

    def action_tables(self) -> None:
        """Show the tables of the block, or of its turn's answer, whole."""
        if self.cursor is not None:
            turn = [block for block in self.blocks if block.turn == self.cursor.turn]
            source = self.cursor.markdown or next((one.markdown for one in turn if one.markdown), "")
            self.post_message(TablesRequested(source))

    def action_ask(self, what: str) -> None:
        if self.cursor is not None and self.cursor.turn:
            self.post_message(_ASKED[what](self.cursor.turn))

    def action_sibling(self, step: int) -> None:
        if self.cursor is not None and self.cursor.turn:
            self.post_message(SiblingRequested(self.cursor.turn, step))

    def action_fold(self) -> None:
        """Fold or open the block, or the thought of its turn."""
        if self.cursor is None:
            return
        turn = [b for b in self.blocks if b.turn == self.cursor.turn and b.foldable and not b.is_extra]
        self.fold(next((b for b in (self.cursor, *reversed(turn)) if b.foldable), None))

    def fold(self, block: Block | None) -> None:
        if block is None:
            return
        index = self.index(block)
        place = block, self.scroll_offset.y - self._rows.top(index)
        block.opened = not block.is_open(self._look)
        block.forget()
        if place[1] > 0:
            place = block, 0
        self.follow = False
        with self.kept_in_place(place):
            self.changed(block)
        self.follow = self.scroll_offset.y >= self.max_scroll_y

    def action_find(self) -> None:
        self.post_message(FindRequested())

    # the mouse

    def on_click(self, event: Click) -> None:
        """Do the action under the pointer; a drag that selected something is no click."""
        offset = event.get_content_offset(self)
        selection = self.text_selection
        if offset is None or (selection is not None and selection.start != selection.end):
            return
        if self._pill and offset.y == self._height - 1 and offset.x >= self._width - len(self._pill) - 1:
            self.go_to_end()
            return
        place = self._place_at(self.scroll_offset.y + offset.y)
        if place is not None and self.scroll_offset.y + offset.y < self._rows.total:
            self._clicked(*place, offset.x)

    def _clicked(self, block: Block, row: int, x: int) -> None:
        match action := action_at(block.row(row, self._look), x):
            case "fold":
                self.fold(block)
            case "previous":
                self.post_message(SiblingRequested(block.turn, -1))
            case "next":
                self.post_message(SiblingRequested(block.turn, 1))
            case "copy":
                above = block.lines(self._look)[:row]
                number = sum(span.action == "copy" for line in above for span in line.spans)
                codes = block.codes()
                self._copy_code(codes[number].text, number, len(codes))
            case _ if action.startswith(TABLE):
                upto = block.lines(self._look)[: row + 1]
                begun = sum(any(span.action.startswith(FIRST) for span in line.spans) for line in upto)
                self.post_message(TablesRequested(block.markdown, max(begun - 1, 0)))

    # finding

    def find(self, text: str) -> int:
        """Mark every occurrence of `text` and return their number; the reading position stays."""
        self._finder.look_for(text)
        self._matches = None
        self._marks.clear()
        self.refresh()
        return len(self.matches)

    @property
    def finding(self) -> bool:
        """Whether there is a text whose occurrences are marked."""
        return self._finder.active

    @property
    def found(self) -> tuple[int, int]:
        """The place of the match that the reader is at, from 1, or 0; and the number of matches."""
        here, matches = self._finder.here, self.matches
        return (matches.index(here) + 1 if here is not None and here in matches else 0), len(matches)

    @property
    def matches(self) -> list[Match]:
        if self._matches is None:
            self._matches = self._finder.matches(self.blocks)
        return self._matches

    def find_next(self) -> None:
        self._find_step(1)

    def find_previous(self) -> None:
        self._find_step(-1)

    def _find_step(self, step: int) -> None:
        matches = self.matches
        if not matches:
            return
        if (here := self._finder.here) in matches and here is not None:
            at = (matches.index(here) + step) % len(matches)
        else:
            at = self._nearest(matches, step)
        self._finder.here = matches[at]
        self._show_match(matches[at])

    def _nearest(self, matches: list[Match], step: int) -> int:
        """Return the first match from the top of the screen on, or the last one before."""
        first = self._rows.at(self.scroll_offset.y)[0]
        after = next((at for at, m in enumerate(matches) if self.index(m.block) >= first), 0)
        return after if step > 0 else after - 1

    def _show_match(self, match: Match) -> None:
        block = match.block
        marks = self._marks_of(block)
        if block.foldable and all(mark.nth != match.nth for mark in marks):
            self.fold(block)
            marks = self._marks_of(block)
        row = next((mark.row for mark in marks if mark.nth == match.nth), marks[-1].row if marks else 0)
        index = self.index(block)
        self._measure_block(index)
        y = self._rows.top(index) + row
        if not self.scroll_offset.y <= y < self.scroll_offset.y + self._height - 1:
            self.go_to(block, row - self._height // 3)
        self._cursor = block
        self.refresh()

    def _marks_of(self, block: Block) -> list[Mark]:
        if block not in self._marks:
            self._marks[block] = self._finder.marks(block, self._look)
        return self._marks[block]

    def changed(self, block: Block) -> None:
        self._marks.pop(block, None)
        self._matches = None
        super().changed(block)

    def _relook(self) -> None:
        self._marks.clear()
        super()._relook()

    def replace_all(self, blocks: Sequence[Block]) -> None:
        self._matches = None
        self._marks.clear()
        super().replace_all(blocks)

    # selecting

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """Return the selected text as in its source, where lines are not broken to fit."""
        if selection.start is None and selection.end is None:
            return "\n\n".join(block.text for block in self.blocks), "\n"
        first = selection.start.y if selection.start else 0
        last = min(selection.end.y if selection.end else self._rows.total, self._rows.total - 1)
        text = ""
        for y in range(first, last + 1):
            block, row = self.blocks[(place := self._rows.at(y))[0]], place[1]
            line = block.row(row, self._look)
            start, end = selection.get_span(y) or (0, 0)
            text += (line.joint if y > first else "") + copied(line, start, None if end == -1 else end)
        return text, "\n"

    def selection_updated(self, selection: Selection | None) -> None:  # noqa: ARG002
        self.refresh()

    # painting

    def watch_unseen(self) -> None:
        self.refresh_lines(self.scroll_offset.y + self._height - 1)

    @property
    def _pill(self) -> str:
        if not self.unseen:
            return ""
        return f" ↓ {self.unseen:,} new {'line' if self.unseen == 1 else 'lines'} · end "

    def render_line(self, y: int) -> Strip:
        row = self.scroll_offset.y + y
        strip = self.strip(row)
        if row < self._rows.total:
            strip = self._with_cursor(strip, *self._rows.at(row))
        selection = self.text_selection
        span = selection.get_span(row) if selection is not None else None
        if span is not None:
            end = len(strip.text) if span[1] == -1 else span[1]
            strip = over(strip, span[0], end, self.palette.style("selected"))
        strip = strip.apply_offsets(0, row)
        if y == self._height - 1 and self._pill:
            strip = beside(strip, self._pill, self.palette.style("pill"))
        return strip

    def _with_cursor(self, strip: Strip, index: int, inner: int) -> Strip:
        block = self.blocks[index]
        if self._finder.active:
            strip = self._with_marks(strip, block, inner)
        if block is self._cursor and self.has_focus and inner < self._rows.height(index) - 1:
            strip = barred(strip, self.palette.style("cursor"))
        return strip

    def _with_marks(self, strip: Strip, block: Block, inner: int) -> Strip:
        for mark in self._marks_of(block):
            if mark.row == inner:
                here = self._finder.here == (block, mark.nth)
                strip = over(
                    strip, mark.start, mark.end, self.palette.style("found.here" if here else "found")
                )
        return strip


def action_at(line: Line, x: int) -> str:
    """Return the action of the cell in column `x` of a line."""
    for span in line.spans:
        x -= cells(span.text)
        if x < 0:
            return span.action
    return ""
