"""A table at its natural width that scrolls both ways; its header and its first column stay in sight."""

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from ..text.markdown import Line, WholeTable
from .transcript.paint import strip_of
from .transcript.palette import Palette

STEP = 8  # columns of cells that a key scrolls
FROZEN_SHARE = 3  # the first column scrolls too if it has more than a third of the width


class TableView(ScrollView, can_focus=True):
    """Shows one table; only the rows in sight are painted."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", f"aside({-STEP})", show=False),
        Binding("right,l", f"aside({STEP})", show=False),
        Binding("shift+left,0", "aside(-100000)", show=False),
        Binding("shift+right,dollar_sign", "aside(100000)", show=False),
        Binding("j", "scroll_down", show=False),
        Binding("k", "scroll_up", show=False),
        Binding("space", "page_down", show=False),
    ]
    DEFAULT_CSS = """
    TableView { height: 1fr; overflow: auto; scrollbar-size-vertical: 1; scrollbar-size-horizontal: 1; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._table = WholeTable([], [], 0, 0, 0)
        self._strips: dict[int, Strip] = {}
        self._palette: Palette | None = None

    def show(self, table: WholeTable) -> None:
        self._table = table
        self._strips.clear()
        self.virtual_size = Size(table.width, len(table.head) + len(table.body))
        self.scroll_to(0, 0, animate=False)
        self.refresh()

    def action_aside(self, cells: int) -> None:
        self.scroll_to(x=self.scroll_offset.x + cells, animate=False)

    @property
    def frozen(self) -> int:
        """The cells of the first column that stay in sight; 0 if it is too wide for that."""
        width = self._table.first_width
        return width if width <= self.size.width // FROZEN_SHARE else 0

    def render_line(self, y: int) -> Strip:
        x, above = self.scroll_offset
        head, width, frozen = len(self._table.head), self.size.width, self.frozen
        strip = self._strip(y if y < head else y + above)
        seen = (
            [strip.crop(0, frozen), strip.crop(frozen + x, x + width)]
            if frozen
            else [strip.crop(x, x + width)]
        )
        return Strip.join(seen).adjust_cell_length(width, self._colours.style(""))

    def _strip(self, row: int) -> Strip:
        colours = self._colours
        if row not in self._strips:
            lines = [*self._table.head, *self._table.body[row - len(self._table.head) :][:1]]
            line = lines[min(row, len(lines) - 1)] if row < self.virtual_size.height else Line(())
            self._strips[row] = strip_of(line, max(self._table.width, self.size.width), colours)
        return self._strips[row]

    @property
    def _colours(self) -> Palette:
        """The palette of the theme; every strip is made anew when that has changed."""
        theme = self.app.current_theme
        if self._palette is None or self._palette.theme is not theme:
            self._palette = Palette(theme, self.app.get_css_variables())
            self._strips.clear()
        return self._palette
