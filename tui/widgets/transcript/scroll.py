"""A view of many blocks that paints only the rows in sight, from strips that it keeps.

Owns scrolling, measuring and painting. Heights out of sight are guesses until there is time to measure them.
The rows in sight stay in place whatever changes above or below; once reached, the end is followed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread

from textual.events import Resize
from textual.geometry import Size
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.timer import Timer
from textual.widget import Widget

from ...text.markdown import Frame, Line, warm
from .blocks import Block, Look, Thoughts
from .paint import strip_of
from .palette import Palette
from .rows import Rows
from .thumbnails import Draw, draw_blocks

_MARGINS = 4  # cells: two before the text, one after it, one under the scrollbar
_IDLE_SECONDS, _SLICE_SECONDS, _PAUSE_SECONDS = 0.05, 0.008, 0.25
_KEPT_BLOCKS = 120

Place = tuple[Block, int]


class BlockView(ScrollView, can_focus=True):
    """Shows blocks one below the other; `follow` keeps the end in sight, `unseen` counts new rows below."""

    unseen = reactive(0, repaint=False)

    def __init__(self, measure: int, id: str | None) -> None:
        super().__init__(id=id)
        self.blocks: list[Block] = []
        self.follow = True
        self._measure = measure
        self._thoughts: Thoughts = "live"
        self._draw: Draw = draw_blocks
        self._look = Look(Frame(80, 80))
        self._rows = Rows()
        self._width = self._height = 0
        self._painted: dict[int, Strip] = {}
        self._placing = False
        self._scrolled = 0.0  # when the user scrolled last
        self._built: dict[Block, None] = {}
        self._palette: Palette | None = None
        self._idle: Timer | None = None
        self._found_heights: dict[Block, int] = {}
        self._greet: Callable[[int, int], list[Line]] = lambda *_: []
        self._greeted: tuple[object, list[Strip]] = (None, [])

    # what the look depends on

    @property
    def thoughts(self) -> Thoughts:
        return self._thoughts

    @thoughts.setter
    def thoughts(self, thoughts: Thoughts) -> None:
        self._thoughts = thoughts
        self._relook()

    @property
    def measure(self) -> int:
        """The widest line of text, in cells; 0 for the whole width."""
        return self._measure

    @measure.setter
    def measure(self, cells: int) -> None:
        self._measure = cells
        self._relook()

    def _relook(self) -> None:
        """Adapt to another width or display of thoughts; heights are guesses again."""
        self._width, self._height = self.size
        if not self._width:
            return
        room = max(self._width - _MARGINS, 8)
        frame = Frame(min(self._measure, room) if self._measure else room, room)
        look = Look(frame, self._thoughts, self._draw)
        known = look.frame == self._look.frame and len(self._rows) == len(self.blocks)
        with self.kept_in_place():
            self._look = look
            self._found_heights.clear()
            if not known:
                self._rows = Rows(block.guess(look) for block in self.blocks)
            for index, block in enumerate(self.blocks if known else ()):
                if block.depends_on_display:
                    self._rows.guess(index, block.guess(look))

    def on_resize(self, _: Resize) -> None:
        self._relook()

    # changing blocks

    def insert(self, index: int, block: Block) -> None:
        """Insert a block; only within `kept_in_place`."""
        self.blocks.insert(index, block)
        self._rows.insert(index, 0)
        self.changed(block)

    def replace_all(self, blocks: Sequence[Block]) -> None:
        """Replace all blocks; only within `kept_in_place`. Blocks that stay keep their heights."""
        known = {
            block: self._rows.height(index)
            for index, block in enumerate(self.blocks)
            if not self._rows.is_guessed(index)
        }
        self.blocks, kept = list(blocks), set(blocks)
        self._built = {block: None for block in self._built if block in kept}
        self._rows = Rows(block.guess(self._look) if block not in known else 0 for block in blocks)
        for index, block in enumerate(blocks):
            if block in known:
                self._rows.set(index, known[block])

    def changed(self, block: Block) -> None:
        """Measure a changed block again; only within `kept_in_place`."""
        grown = self._measure_block(self.index(block))
        if not self.follow:
            self.unseen = max(0, self.unseen + grown)

    def index(self, block: Block) -> int:
        return self.blocks.index(block)

    @contextmanager
    def kept_in_place(self, place: Place | None = None) -> Iterator[None]:
        """Keep `place`, or else the first row in sight, at the top while blocks change."""
        place = place or self._place_at(self.scroll_offset.y)
        yield
        self._settle(None if self.follow else place)

    # scrolling

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if not self._placing and round(old_value) != round(new_value):
            self._scrolled = time.monotonic()
            self.follow = new_value >= self.max_scroll_y
            self._settle(None if self.follow else self._place_at(round(new_value)))

    def go_to(self, block: Block, row: int, above: int = 0) -> None:
        """Bring a block's row into sight, `above` rows under the top edge, and stop following the end."""
        self.follow = False
        self._settle((block, row - above))
        self.follow = self.scroll_offset.y >= self.max_scroll_y

    @property
    def in_sight(self) -> Sequence[Block]:
        """The blocks that have a row on the screen."""
        if not self._rows.total:
            return ()
        y = self.scroll_offset.y
        return self.blocks[self._rows.at(y)[0] : self._rows.at(y + self._height - 1)[0] + 1]

    def go_to_end(self) -> None:
        self.follow = True
        self._settle(None)

    def _place_at(self, y: int) -> Place | None:
        if not self._rows.total:
            return None
        index, row = self._rows.at(y)
        return self.blocks[index], row

    def _settle(self, place: Place | None) -> None:
        """Measure the rows to be seen and a screen around them, then scroll to `place` or to the end."""
        if not self._height:
            return
        if place is None or place[0] not in self.blocks:
            place = None if self.follow else self._place_at(self.scroll_offset.y)
        if place is None:
            self._measure_around(len(self.blocks), 0)
            y = self._rows.total
        else:
            index = self.index(place[0])
            self._measure_around(index, max(0, -place[1]))
            y = self._rows.top(index) + min(place[1], max(self._rows.height(index) - 1, 0))
        if self.follow:
            self.unseen = 0
        self._scroll(y)
        self._tidy()

    def _scroll(self, y: int) -> None:
        """Scroll to a row and repaint what differs; the scrollbar always shows, so the layout stays."""
        self._placing = True
        try:
            size = Size(self._width, self._rows.total)
            self.set_reactive(Widget.virtual_size, size)  # pyright: ignore[reportArgumentType]
            self.vertical_scrollbar.window_virtual_size = self._rows.total
            y = max(0, min(y, self.max_scroll_y))
            if y != self.scroll_offset.y:
                self.scroll_to(y=y, animate=False)
        finally:
            self._placing = False
        strips = [self.strip(y + line) for line in range(self._height)]
        changed = [line for line, strip in enumerate(strips) if strip is not self._painted.get(line)]
        self._painted = dict(enumerate(strips))
        if changed:
            self.refresh_lines(y + changed[0], changed[-1] - changed[0] + 1)

    # measuring

    def _measure_around(self, index: int, above: int) -> None:
        page = self._height
        self._measure_until(range(index, len(self.blocks)), 2 * page)
        self._measure_until(range(min(index, len(self.blocks)) - 1, -1, -1), 2 * page + above)

    def _measure_until(self, indices: range, rows: int) -> None:
        for index in indices:
            self._measure_block(index)
            rows -= self._rows.height(index)
            if rows <= 0:
                return

    def _measure_block(self, index: int) -> int:
        block = self.blocks[index]
        self._built.pop(block, None)
        self._built[block] = None
        return self._rows.set(index, block.height(self._look))

    def _tidy(self) -> None:
        """Drop the lines of blocks long out of sight; measure the others when there is time."""
        surplus = len(self._built) - max(_KEPT_BLOCKS, 6 * self._height)
        for block in list(self._built)[: max(0, surplus)]:
            del self._built[block]
            block.forget()
        if self._idle is not None and next(self._rows.guessed(), None) is not None:
            self._idle.resume()

    def on_mount(self) -> None:
        self.call_after_refresh(Thread(target=warm, daemon=True).start)
        self._idle = self.set_interval(_IDLE_SECONDS, self._measure_some, pause=True)

    @property
    def busy(self) -> bool:
        """Whether measuring has to wait."""
        return self.text_selection is not None or time.monotonic() < self._scrolled + _PAUSE_SECONDS

    def _measure_some(self) -> None:
        """Measure for a moment; the heights are used once all are known, so that little is painted."""
        if self.busy or self._idle is None:
            return
        until = time.perf_counter() + _SLICE_SECONDS
        for index in self._rows.guessed():
            block = self.blocks[index]
            if block in self._found_heights:
                continue
            self._found_heights[block] = block.height(self._look)
            if block not in self._built:
                block.forget()
            if time.perf_counter() > until:
                return
        self._idle.pause()
        with self.kept_in_place():
            for index in list(self._rows.guessed()):
                self._rows.set(index, self._found_heights.get(self.blocks[index], self._rows.height(index)))
        self._found_heights.clear()

    # painting

    @property
    def palette(self) -> Palette:
        """The palette of the theme; made anew, as is every strip, when the theme has changed."""
        theme = self.app.current_theme
        if self._palette is None or self._palette.theme is not theme:
            self._palette = Palette(theme, self.app.get_css_variables())
            for block in self.blocks:
                block.strips.clear()
        return self._palette

    def strip(self, row: int) -> Strip:
        """Return a row of the transcript without marks over it."""
        palette = self.palette
        if row >= self._rows.total:
            blank = Strip.blank(self._width, palette.style(""))
            return blank if self.blocks else self._greeting_strip(row, blank, palette)
        index, inner = self._rows.at(row)
        block = self.blocks[index]
        strip = block.strips.get(inner)
        if strip is None or strip.cell_length != self._width:
            strip = block.strips[inner] = strip_of(block.row(inner, self._look), self._width, palette)
        return strip

    def greet_with(self, lines: Callable[[int, int], list[Line]]) -> None:
        """Show `lines(width, height)` while there are no blocks."""
        self._greet, self._greeted = lines, (None, [])
        if not self.blocks:
            self._settle(None)

    def _greeting_strip(self, row: int, blank: Strip, palette: Palette) -> Strip:
        key = (self._width, self._height, palette)
        if self._greeted[0] != key:
            lines = self._greet(self._look.frame.width, self._height)
            margined = (Line((Block.margin, *line.spans)) for line in lines)
            self._greeted = key, [strip_of(line, self._width, palette) for line in margined]
        strips = self._greeted[1]
        return strips[row] if row < len(strips) else blank
