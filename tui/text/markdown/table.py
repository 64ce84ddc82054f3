"""Tables: columns as wide as their content, the widest shrunk to fit; as records if nothing fits."""

from functools import lru_cache
from typing import TYPE_CHECKING

from .inline import inline
from .lines import Frame, Line, Span, lay, plain, styled, width_of
from .parser import WIDTH_ROWS, parse

if TYPE_CHECKING:
    from markdown_it.tree import SyntaxTreeNode as Node

Cell = list[Span]
_LEAST = 4  # cells of a column that can still be read
_BETWEEN = " │ "


def table(node: "Node", frame: Frame, begun: str = "") -> list[Line]:
    """Return the table's lines; only its rows if `begun`, the source of its beginning, is on the screen."""
    head, *body = _cells(node)
    widths = _widths_of(begun, frame.wide) if begun else _fitted([head, *body], frame.wide)
    if not widths:
        return _records(head, body, frame, begun=bool(begun))
    aligns = [
        str(cell.attrs.get("style", "")).removeprefix("text-align:") for cell in _rows(node)[0].children
    ]
    lines = [line for row in body for line in _row(row, widths, aligns)]
    return lines if begun else [*_row(_strong(head), widths, aligns), _rule(widths), *lines]


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
    """Return the width of each column, the widest shrunk first; nothing if none would be readable."""
    rows = rows[: WIDTH_ROWS + 1]
    count = len(rows[0])
    widths = [
        max(1, *(_natural(row[column]) for row in rows if column < len(row))) for column in range(count)
    ]
    room -= len(_BETWEEN) * (count - 1)
    if sum(widths) <= room:
        return widths
    if room < _LEAST * count:
        return []
    cap = _cap(widths, room)
    fitted = [min(width, cap) for width in widths]
    left = room - sum(fitted)
    for column in sorted(range(count), key=lambda column: -widths[column])[:left]:
        fitted[column] += widths[column] > fitted[column]
    return fitted


def _natural(cell: Cell) -> int:
    return max((width_of(line.spans) for line in lay(cell, 10_000)), default=0)


def _cap(widths: list[int], room: int) -> int:
    """Return the largest cap of column widths at which all columns fit."""
    left = len(widths)
    for width in sorted(widths):
        if width * left > room:
            return room // left
        room, left = room - width, left - 1
    return max(widths)


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
