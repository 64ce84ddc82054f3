"""A list to choose from, whose row under the cursor has a `›` in its margin, also without colours."""

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widgets import OptionList

MARK = "›"


class Choices(OptionList):
    """An `OptionList` with a margin of two cells for the mark; every list of the app is one."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"choices--mark"}

    def render_line(self, y: int) -> Strip:
        strip = super().render_line(y)
        line = self.scroll_offset.y + y
        lines = self._lines
        if line >= len(lines) or tuple(lines[line]) != (self.highlighted, 0) or strip.cell_length < 2:
            return strip
        ground = next(iter(strip)).style or Style()
        mark = Style(color=self.get_component_rich_style("choices--mark").color, bold=True)
        return Strip([Segment(MARK, ground + mark), *strip.crop(1)], strip.cell_length)
