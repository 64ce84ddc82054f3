"""Lines of named styles as strips of exactly the widget's width, with marks painted over them."""

from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from ...text.kitty import PLACEHOLDER
from ...text.markdown import Line
from ...text.sanitise import cells
from .palette import Palette


def strip_of(line: Line, width: int, palette: Palette) -> Strip:
    """Return the line in exactly `width` cells, cut or padded with blanks."""
    segments = [
        Segment(span.text, palette.style(span.style, span.action)) for span in line.spans if span.text
    ]
    used = sum(cells(segment.text) for segment in segments)
    if used < width:
        segments.append(Segment(" " * (width - used), palette.style("")))
    return Strip(segments, max(used, width)).adjust_cell_length(width)


def over(strip: Strip, start: int, end: int, style: Style) -> Strip:
    """Return the strip with `style` on its characters from `start` to `end`; pictures stay as they are."""
    segments: list[Segment] = []
    at = 0
    for text, own, _ in strip:
        first, last = max(start - at, 0), min(end - at, len(text))
        if first < last and not text.startswith(PLACEHOLDER):
            parts = (text[:first], own), (text[first:last], own + style if own else style), (text[last:], own)
            segments += [Segment(part, look) for part, look in parts if part]
        else:
            segments.append(Segment(text, own))
        at += len(text)
    return Strip(segments, strip.cell_length)


def barred(strip: Strip, style: Style) -> Strip:
    """Return the strip with a bar in its first cell, which must be one character."""
    return Strip([Segment("┃", style), *strip.crop(1)], strip.cell_length)


def beside(strip: Strip, text: str, style: Style) -> Strip:
    """Return the strip with `text` over its right end, one cell from the edge, if it fits."""
    room = strip.cell_length - cells(text) - 1
    if room < 0:
        return strip
    kept = strip.crop(0, room)
    return Strip([*kept, Segment(text, style), Segment(" ")], None).adjust_cell_length(strip.cell_length)
