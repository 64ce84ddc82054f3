"""A text in tokens, each in a style of its own, with a cursor that moves from token to token."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from ..text.sanitise import cells, cut
from .transcript.palette import Palette

Row = list[tuple[int, str]]  # the number of a token, and what of it stands in the row
BREAK = "↵"


def rows_of(texts: Sequence[str], width: int) -> list[Row]:
    """Break tokens into rows of at most `width` cells; a newline is a sign, and ends its row.

    A token that does not fit begins another row, and one that is wider than a row is cut.
    """
    rows: list[Row] = [[]]
    used = 0
    for number, text in enumerate(texts):
        for place, part in enumerate(text.replace("\t", "    ").split("\n")):
            if place:  # the sign may stand in the last cell of a full row
                rows[-1].append((number, BREAK))
                rows.append([])
                used = 0
            if not part:
                continue
            if used and used + cells(part) > width - 1:
                rows.append([])
                used = 0
                part = part.lstrip(" ") or part  # the space that the break replaces
            part = cut(part, max(width - 1, 1))
            rows[-1].append((number, part))
            used += cells(part)
    return rows


class TokenText(ScrollView, can_focus=True):
    """Shows tokens as (text, style name); tells of every move of the cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", show=False),
        Binding("right,l", "move(1)", show=False),
        Binding("up,k", "rows(-1)", show=False),
        Binding("down,j", "rows(1)", show=False),
        Binding("pageup", "rows(-10)", show=False),
        Binding("pagedown", "rows(10)", show=False),
        Binding("home", "go(0)", show=False),
        Binding("end", "go(-1)", show=False),
        Binding("n", "unlikely(1)", show=False),
        Binding("p", "unlikely(-1)", show=False),
    ]
    DEFAULT_CSS = "TokenText { height: 1fr; padding: 0 1; scrollbar-size-vertical: 1; }"

    class Moved(Message):
        """The cursor is on another token."""

        def __init__(self, number: int):
            super().__init__()
            self.number = number

    def __init__(self, tokens: Sequence[tuple[str, str]]):
        super().__init__()
        self.cursor = 0
        self._tokens, self._rows = tokens, list[Row]()
        self._firsts: list[int] = []  # of each row the first token
        self._palette: Palette | None = None

    def on_resize(self) -> None:
        self._rows = rows_of([text for text, _ in self._tokens], max(self.size.width, 2))
        before = 0
        self._firsts = []
        for row in self._rows:
            before = row[0][0] if row else before
            self._firsts.append(before)
        self.virtual_size = Size(self.size.width, len(self._rows))
        self._palette = None
        self._show()

    def render_line(self, y: int) -> Strip:
        width, place = self.size.width, y + self.scroll_offset.y
        if self._palette is None:
            self._palette = Palette(self.app.current_theme, self.app.get_css_variables())
        segments = [
            Segment(text, self._style(number, dim=text == BREAK))
            for number, text in (self._rows[place] if place < len(self._rows) else ())
        ]
        return Strip(segments).adjust_cell_length(width, self.rich_style)

    def _style(self, number: int, *, dim: bool) -> Style:
        assert self._palette is not None
        name = self._tokens[number][1]
        style = self._palette.style("dim" if dim else name)
        if name == "bad":
            style += Style(underline=True)  # the least likely ones stand out without colours too
        return style + Style(reverse=True, bold=True) if number == self.cursor else style

    def _row_of(self, number: int) -> int:
        return max(bisect_right(self._firsts, number) - 1, 0)

    def _show(self) -> None:
        """Scroll to the cursor and draw everything anew."""
        row = self._row_of(self.cursor)
        self.scroll_to_region(Region(0, row, 1, 1), animate=False, force=True)
        self.refresh()

    def go_to(self, number: int) -> None:
        """Move the cursor to a token, or to the nearest that there is."""
        number = min(max(number, 0), len(self._tokens) - 1)
        if number != self.cursor and self._tokens:
            self.cursor = number
            self.post_message(self.Moved(number))
            self._show()

    def action_move(self, step: int) -> None:
        self.go_to(self.cursor + step)

    def action_go(self, place: int) -> None:
        self.go_to(place if place >= 0 else len(self._tokens) - 1)

    def action_rows(self, step: int) -> None:
        """Move to about the same place some rows further."""
        if self._rows:
            here = self._row_of(self.cursor)
            row = min(max(here + step, 0), len(self._rows) - 1)
            self.go_to(self._firsts[row] + self.cursor - self._firsts[here])

    def action_unlikely(self, step: int) -> None:
        """Move to the next token that was not likely."""
        number = self.cursor + step
        while 0 <= number < len(self._tokens):
            if self._tokens[number][1] in ("warn", "bad"):
                self.go_to(number)
                return
            number += step

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        row = offset.y + self.scroll_offset.y if offset else len(self._rows)
        if offset is None or row >= len(self._rows):
            return
        at = 0
        for number, text in self._rows[row]:
            at += cells(text)
            if offset.x < at:
                self.go_to(number)
                return
