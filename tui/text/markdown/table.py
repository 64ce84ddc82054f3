"""Tables: columns as wide as their content, the widest shrunk to fit; as records if that would cut words.

A click on a table asks for the whole of it. Of the actions that its spans have, those of its first line are
FIRST, or FOLDED where its columns had no room.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from .inline import inline
from .lines import Frame, Line, Span, lay, plain, styled, width_of
from .parser import WIDTH_ROWS, parse

if TYPE_CHECKING:
    from markdown_it.tree import SyntaxTreeNode as Node

Cell = list[Span]
_LEAST = 4  # cells of a column that can still be read
_WHOLE = 16  # cells of a word that a column may cut: addresses and the like
_BETWEEN = " │ "
_WIDEST = 60  # cells of a column of a whole table
TABLE, FIRST, FOLDED = "table", "table.first", "table.first.folded"


@dataclass(frozen=True)
class WholeTable:
    """A table at its natural width: the lines of its header, rule included, and of its rows.

    `first_width` is that of its first column with the line behind it; a row may have several lines.
    """

    head: list[Line]
    body: list[Line]
    first_width: int
    columns: int
    rows: int

    @property
    def width(self) -> int:
        return max(width_of(line.spans) for line in self.head)


def table(node: "Node", frame: Frame, begun: str = "") -> list[Line]:
    """Return the table's lines; only its rows if `begun`, the source of its beginning, is on the screen."""
    head, *body = _cells(node)
    widths = _widths_of(begun, frame.wide) if begun else _fitted([head, *body], frame.wide)
    if widths:
        aligns = _aligns(node)
        lines = [line for row in body for line in _row(row, widths, aligns)]
        lines = lines if begun else [*_head(head, widths, aligns), *lines]
    else:
        lines = _records(head, body, frame, begun=bool(begun))
    first = FIRST if widths and widths == _natural_widths([head, *body]) else FOLDED
    return [_clickable(line, TABLE if begun or place else first) for place, line in enumerate(lines)]


def whole_tables(source: str) -> list[WholeTable]:
    """Return every table of a text, nested ones too, at its natural width."""
    return [_whole(node) for node in parse(source).walk() if node.type == "table"]


def _whole(node: "Node") -> WholeTable:
    head, *body = _cells(node)
    widths, aligns = [min(width, _WIDEST) for width in _natural_widths([head, *body])], _aligns(node)
    lines = [line for row in body for line in _row(row, widths, aligns)]
    return WholeTable(_head(head, widths, aligns), lines, widths[0] + len(_BETWEEN), len(widths), len(body))


def _clickable(line: Line, action: str) -> Line:
    return line._replace(
        spans=tuple(span if span.action else span._replace(action=action) for span in line.spans)
    )


def _aligns(node: "Node") -> list[str]:
    cells = _rows(node)[0].children
    return [str(cell.attrs.get("style", "")).removeprefix("text-align:") for cell in cells]


def _head(head: list[Cell], widths: list[int], aligns: list[str]) -> list[Line]:
    return [*_row(_strong(head), widths, aligns), _rule(widths)]


def _rows(node: "Node") -> list["Node"]:
    return [row for part in node.children for row in part.children]


def _cells(node: "Node") -> list[list[Cell]]:
    return [[inline(cell) for cell in row.children] for row in _rows(node)]


def _strong(row: list[Cell]) -> list[Cell]:
    return [styled(cell, "strong") for cell in row]


def _rule(widths: list[int]) -> Line:
    return Line(
        (Span("─┼─".join("─" * width for width in widths), "rule", " | ".join("---" for _ in widths)),)
    )


@lru_cache(8)
def _widths_of(begun: str, room: int) -> list[int]:
    return _fitted(_cells(parse(begun).children[0]), room)


def _fitted(rows: list[list[Cell]], room: int) -> list[int]:
    """Return the width of each column, the widest shrunk first; nothing if words would be cut."""
    rows = rows[: WIDTH_ROWS + 1]
    count = len(rows[0])
    widths = _natural_widths(rows)
    room -= len(_BETWEEN) * (count - 1)
    if sum(widths) <= room:
        return widths
    least = [
        max(_LEAST, *(_word(row[column]) for row in rows if column < len(row))) for column in range(count)
    ]
    least = [min(pair) for pair in zip(least, widths, strict=True)]
    return _shrunk(widths, least, room) if sum(least) <= room else []


def _natural_widths(rows: list[list[Cell]]) -> list[int]:
    rows = rows[: WIDTH_ROWS + 1]
    return [
        max(1, *(_natural(row[column]) for row in rows if column < len(row)))
        for column in range(len(rows[0]))
    ]


def _shrunk(widths: list[int], least: list[int], room: int) -> list[int]:
    """Return widths that fill `room`, as equal as they can be, each at most as wide as wanted."""
    cap = min(max(widths), room)
    while sum(fitted := [max(low, min(width, cap)) for width, low in zip(widths, least, strict=True)]) > room:
        cap -= 1
    left = room - sum(fitted)
    for column in sorted(range(len(widths)), key=lambda column: -widths[column])[:left]:
        fitted[column] += widths[column] > fitted[column]
    return fitted


def _natural(cell: Cell) -> int:
    return max((width_of(line.spans) for line in lay(cell, 10_000)), default=0)


def _word(cell: Cell) -> int:
    """Return the width of the longest word, of one that may be cut only so much."""
    text = "".join(span.text for span in cell)
    sizes = [(width_of([Span(word)]), len(word)) for word in text.split()]
    # wide characters are words of their own
    return min(max((size for size, count in sizes if size <= count), default=0), _WHOLE)


def _row(cells: list[Cell], widths: list[int], aligns: list[str]) -> list[Line]:
    columns = [lay(cell, width) for cell, width in zip(cells, widths, strict=False)]
    columns += [[] for _ in widths[len(columns) :]]
    height = max(map(len, columns), default=1)
    return [Line(tuple(_row_line(columns, widths, aligns, at))) for at in range(height)]


def _row_line(columns: list[list[Line]], widths: list[int], aligns: list[str], at: int) -> list[Span]:
    spans: list[Span] = []
    for number, (lines, width) in enumerate(zip(columns, widths, strict=True)):
        inner = lines[at].spans if at < len(lines) else ()
        free = width - width_of(inner)
        before = {"right": free, "center": free // 2}.get(aligns[number], 0)
        if number:
            spans.append(Span(_BETWEEN, "rule", " | "))
        spans += [Span(" " * before, copy=""), *inner, Span(" " * (free - before), copy="")]
    return [span for span in spans if span.text]


def _records(head: list[Cell], body: list[list[Cell]], frame: Frame, *, begun: bool) -> list[Line]:
    """Return every row as lines of `name: value`."""
    lines: list[Line] = []
    for row in body or [[]]:
        if lines or begun:
            lines.append(Line((Span("─" * min(frame.wide, 8), "rule", ""),)))
        for name, value in zip(head, [*row, *[[] for _ in head[len(row) :]]], strict=False):
            label = "".join(plain(line) for line in lay(name, 10_000))
            lines += lay([Span(f"{label}: ", "strong"), *value], frame.wide)
    return lines
