"""A picture in a message as lines: what it is, and a thumbnail of half blocks, two pixels in a cell."""

from ....core.conversation.summary import ShownPicture
from ...text.figures import format_tokens
from ...text.markdown import Line, Span
from ...text.sanitise import cut, printable

HALF = "▀"


def picture_lines(picture: ShownPicture, width: int) -> list[Line]:
    """Return the lines of a picture; where it is too wide for `width` cells, without its thumbnail."""
    name = " ".join(printable(picture.name).split())
    size = f"{picture.width:,} × {picture.height:,}"
    chip = f"▨ {name} · {size} · {format_tokens(picture.tokens)} tokens"
    thumbnail = picture.thumbnail if picture.thumbnail.width <= width else None
    rows = _rows(thumbnail.pixels, 6 * thumbnail.width) if thumbnail else []
    return [Line((Span(cut(chip, width), "fact"),)), *rows]


def _rows(pixels: str, step: int) -> list[Line]:
    """Return the lines of pixels with `step` digits in a row."""
    rows = [pixels[begin : begin + step] for begin in range(0, len(pixels), step)]
    pairs = zip(rows[::2], [*rows[1::2], rows[-1]], strict=False)  # the last row stands for a missing one
    return [Line(tuple(map(_cell, _colours(upper), _colours(lower)))) for upper, lower in pairs]


def _colours(row: str) -> list[str]:
    return [row[begin : begin + 6] for begin in range(0, len(row), 6)]


def _cell(upper: str, lower: str) -> Span:
    return Span(HALF, f"rgb:{upper}:{lower}")
