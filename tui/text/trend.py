"""Several series of figures over the same axis as one picture: a mark and a colour for each.

The marks differ too, so that the picture can be read without colours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from .sanitise import cells, cut, printable

Line = list[tuple[str, str]]
STYLES = ("accent", "good", "warn", "bar", "bad")
MARKS, ASCII_MARKS = "●■▲◆○", "*#+ox"
ROWS, LEAST_COLUMNS, MOST_COLUMNS = 8, 4, 72


@dataclass(frozen=True)
class Series:
    """Figures of one name: `points` are (x, y), both at least 0."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Trend:
    """Series over a common x axis; the y axis begins at 0."""

    series: Sequence[Series]
    x_label: str
    y_label: str


def trend_lines(trend: Trend, width: int, unicode: bool) -> list[Line]:
    """Draw the series in at most `width` cells, and a legend where there are several."""
    known = [Series(one.name, list(filter(_is_known, one.points))) for one in trend.series]
    points = [point for one in known for point in one.points]
    if not points:
        return []
    low, high, top = min(x for x, _ in points), max(x for x, _ in points), max(y for _, y in points) or 1.0
    ticks = {0: f"{top:,.4g}", ROWS - 1: "0"}
    margin = max(map(len, ticks.values()))
    columns = max(min(width - margin - 2, MOST_COLUMNS), LEAST_COLUMNS)
    grid: list[list[tuple[str, str]]] = [[("", " ")] * columns for _ in range(ROWS)]
    for one, (style, mark) in zip(known, _looks(unicode), strict=False):
        for x, y in one.points:
            column = round((x - low) / (high - low or 1) * (columns - 1))
            grid[round((1 - y / top) * (ROWS - 1))][column] = style, mark
    vertical, corner, across = "│└─" if unicode else "|+-"
    rows = [
        [("dim", f"{ticks.get(y, ''):>{margin}} {vertical}"), *_joined(row)] for y, row in enumerate(grid)
    ]
    left, right = f"{low:g}", f"{high:g} {_name(trend.x_label)}"
    scale = f"{left}{right:>{max(columns - len(left), cells(right) + 1)}}"
    axis = [[("dim", f"{'':>{margin}} {corner}{across * columns}")], [("dim", f"{'':>{margin}}  {scale}")]]
    return [[("dim", _name(trend.y_label))], *rows, *axis, *_legend(known, width, unicode)]


def trend_words(trend: Trend) -> list[str]:
    """Return a sentence for each series."""
    words = []
    for one in trend.series:
        values = [y for x, y in one.points if _is_known((x, y))]
        if values:
            mean = sum(values) / len(values)
            span = f"{min(values):.3g} to {max(values):.3g}, on average {mean:.3g}"
            words.append(f"{one.name}: {span} {trend.y_label}".strip())
    return words


def _is_known(point: tuple[float, float]) -> bool:
    return all(math.isfinite(value) and 0 <= value < 1e100 for value in point)


def _looks(unicode: bool) -> "cycle[tuple[str, str]]":
    return cycle(zip(STYLES, MARKS if unicode else ASCII_MARKS, strict=True))


def _joined(row: Sequence[tuple[str, str]]) -> Line:
    """Return the cells of a row without the empty ones at its end."""
    last = max((place for place, (style, _) in enumerate(row) if style), default=-1)
    return list(row[: last + 1])


def _legend(series: Sequence[Series], width: int, unicode: bool) -> list[Line]:
    if len(series) < 2:
        return []
    return [
        [(style, mark), ("", f" {cut(_name(one.name), max(width - 2, 1))}")]
        for one, (style, mark) in zip(series, _looks(unicode), strict=False)
    ]


def _name(text: str) -> str:
    return " ".join(printable(text).split())
