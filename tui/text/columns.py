"""Rows of text as columns for a terminal or a pipe."""

from collections.abc import Sequence

from .sanitise import cells, printable

GAP = "  "


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Align rows as columns; the columns numbered in `right` are right-aligned."""
    clean = [[" ".join(printable(cell).split()) for cell in row] for row in rows]
    widths = [max(map(cells, column)) for column in zip(*clean, strict=True)]
    return "".join(_line(row, widths, right) for row in clean)


def _line(row: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> str:
    parts = []
    for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
        free = " " * (width - cells(cell))
        parts.append(free + cell if place in right else cell + free)
    return GAP.join(parts).rstrip() + "\n"
