"""A picture in a message as lines: what it is, and a thumbnail, by default of half blocks."""

from collections.abc import Callable, Iterator
from itertools import groupby

from ....core.conversation.summary import ShownPicture
from ...text.figures import format_tokens
from ...text.kitty import Handle
from ...text.markdown import Line, Span
from ...text.sanitise import cut, printable

HALF = "▀"
# returns the lines that draw a picture below its description
Draw = Callable[[ShownPicture], list[Line]]


def draw_blocks(picture: ShownPicture) -> list[Line]:
    """Return half blocks, two pixels in a cell."""
    pixels, step = picture.thumbnail.pixels, 6 * picture.thumbnail.width
    rows = [pixels[begin : begin + step] for begin in range(0, len(pixels), step)]
    pairs = zip(rows[::2], [*rows[1::2], rows[-1]], strict=False)  # the last row stands for a missing one
    return [Line(tuple(_spans(upper, lower))) for upper, lower in pairs]


def draw_nothing(_: ShownPicture) -> list[Line]:
    return []


def draw_cells(picture: ShownPicture, handle: Handle) -> list[Line]:
    """Return the cells in which Kitty draws the picture that it has under `handle`."""
    columns, rows = size_in_cells(picture)
    style = f"ink:{handle.colour}"
    return [Line(tuple(Span(cell, style, "") for cell in handle.row(row, columns))) for row in range(rows)]


def size_in_cells(picture: ShownPicture) -> tuple[int, int]:
    """Return the columns and rows of a thumbnail, however it is drawn."""
    return picture.thumbnail.width, (picture.thumbnail.height + 1) // 2


def picture_lines(picture: ShownPicture, width: int, draw: Draw = draw_blocks) -> list[Line]:
    """Return the lines of a picture; where it is too wide for `width` cells, without its thumbnail."""
    chip = Line((Span(cut(f"▨ {describe_picture(picture)}", width), "fact"),))
    return [chip, *(draw(picture) if picture.thumbnail.width <= width else [])]


def describe_picture(picture: ShownPicture) -> str:
    """Return name, size and, once they are known, tokens of a picture."""
    name = " ".join(printable(picture.name).split())
    tokens = f" · {format_tokens(picture.tokens)} tokens" if picture.tokens else ""
    return f"{name} · {picture.width:,} × {picture.height:,}{tokens}"


def _colours(row: str) -> list[str]:
    return [row[begin : begin + 6] for begin in range(0, len(row), 6)]


def _spans(upper: str, lower: str) -> Iterator[Span]:
    """Yield a span for each run of cells with the same two colours."""
    for (above, below), run in groupby(zip(_colours(upper), _colours(lower), strict=True)):
        yield Span(HALF * len(list(run)), f"rgb:{above}:{below}", "")
