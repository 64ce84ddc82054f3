"""Tables and small charts as values, and pure functions that draw them as styled lines of text.

Both front ends paint these lines. No line is wider than asked for, whatever the cells hold; what is cut ends
in an ellipsis. Refuses nothing: figures that are no finite numbers are drawn as none.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

from .diff import Diff, diff_lines, diff_words
from .sanitise import cells, cut, fit, printable, wrap
from .trend import Trend, trend_lines, trend_words

Style = Literal["", "title", "dim", "accent", "good", "warn", "bad", "bar"]
Mood = Literal["", "running", "failed"]
Line = list[tuple[str, str]]
GAP = 2
MIN_COLUMN = 4
BAR_CELLS = 30
PLOT_ROWS, LOW_PLOT_ROWS = 10, 5  # with two points there is little to see
CURVE_ROWS = 8
UNLIMITED = 1 << 20  # cells
# what our own words hold that a plain terminal may not show, as wide as that
ASCII = str.maketrans("·…│", "-~|")
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# beyond this, as for NaN and infinity, differences are not finite
MAX_COORDINATE = 1e300


@dataclass(frozen=True)
class Table:
    """Rows under a header; `align` has `<` or `>` for each column, all left if it is empty.

    Read aloud, a row has the names of its columns if it is `named`; words that explain themselves need none.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str = ""
    named: bool = True


@dataclass(frozen=True)
class Bar:
    """One bar: a value of at least 0, the same as `text`, and its `style`."""

    label: str
    value: float
    text: str = ""
    style: Style = "bar"


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, scaled to the largest value, or to `top` if that is larger."""

    rows: Sequence[Bar]
    top: float = 0.0


@dataclass(frozen=True)
class Spark:
    """A sparkline: one row of small columns, scaled to the largest value."""

    values: Sequence[float]
    label: str = ""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Plot:
    """Points on linear axes; a legend below explains their letters."""

    points: Sequence[Point]
    x_label: str
    y_label: str


@dataclass(frozen=True)
class Curve:
    """A line through positive points over a logarithmic y axis, with the point `chosen` marked by an X."""

    points: Sequence[tuple[float, float]]
    chosen: tuple[float, float]
    x_label: str
    y_label: str


@dataclass(frozen=True)
class Gauge:
    """A progress bar: `done` of `total`, with a text beside it."""

    done: float
    total: float
    text: str = ""


@dataclass(frozen=True)
class Lines:
    """Wrapped text."""

    lines: Sequence[str]
    style: Style = ""


@dataclass(frozen=True)
class Markdown:
    """Markdown that a front end may render; here only wrapped."""

    source: str


Part = Table | Bars | Spark | Plot | Curve | Trend | Diff | Gauge | Lines | Markdown


@dataclass(frozen=True)
class Report:
    """The output of a command: a title, parts, a `note` on its state, and whether that is good or bad."""

    title: str
    parts: Sequence[Part] = field(default_factory=tuple)
    note: str = ""
    mood: Mood = ""

    @property
    def heading(self) -> str:
        """The title with the note."""
        return " · ".join(part for part in (self.title, self.note) if part)


def report_lines(report: Report, width: int, unicode: bool = True) -> list[Line]:
    """Draw `report` as lines of (style, text), at most `width` cells wide, in ASCII without `unicode`."""
    width = max(width, 1)
    lines: list[Line] = []
    if report.heading:
        lines.append([("title", _one_line(report.heading))])
    for part in report.parts:
        lines += _part_lines(part, width, _Glyphs.of(unicode))
    lines = [_fit(line, width) for line in lines]
    return lines if unicode else [[(style, text.translate(ASCII)) for style, text in line] for line in lines]


def report_text(report: Report) -> str:
    """Return `report` in words, for files and screen readers: a row is a sentence, and nothing is drawn."""
    lines = [report.heading] if report.heading else []
    for part in report.parts:
        lines += _spoken(part)
    return "\n".join(printable(line) for line in lines)


def report_plain(report: Report, unicode: bool = True) -> str:
    """Draw `report` without styles where nothing limits the width; empty if there is nothing to draw."""
    lines = report_lines(report, UNLIMITED, unicode)
    return "".join(f"{''.join(text for _, text in line).rstrip()}\n" for line in lines)


@dataclass(frozen=True)
class _Glyphs:
    full: str
    empty: str
    half: str
    levels: str  # columns from low to high
    vertical: str
    corner: str
    horizontal: str
    unicode: bool

    @classmethod
    def of(cls, unicode: bool) -> "_Glyphs":
        if unicode:
            return cls("━", "╌", "╸", "▁▂▃▄▅▆▇█", "│", "└", "─", unicode)
        return cls("#", ".", "", "_.:-=+*#", "|", "+", "-", unicode)


def _part_lines(part: Part, width: int, glyphs: _Glyphs) -> list[Line]:
    match part:
        case Table():
            return _table(part, width)
        case Bars():
            return _bars(part, width, glyphs)
        case Spark():
            return [[("dim", sparkline(part.values, glyphs.levels)), ("dim", f"  {_one_line(part.label)}")]]
        case Plot():
            return _plot(part, width, glyphs)
        case Curve():
            return _curve(part, width, glyphs)
        case Trend():
            return trend_lines(part, width, glyphs.unicode)
        case Diff():
            return diff_lines(part, width)
        case Gauge():
            return [_gauge(part, width, glyphs)]
        case Lines(lines, style):
            return [[(style, row)] for line in lines for row in _wrapped(line, width)]
        case Markdown(source):
            return [[("", row)] for line in source.split("\n") for row in _wrapped(line, width)]


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(printable(text).replace("\t", "    "), width)


def _one_line(text: str) -> str:
    return printable(text).replace("\n", " ").replace("\t", " ")


def _fit(line: Line, width: int) -> Line:
    """Cut `line` to `width` cells."""
    left, kept = width, []
    for style, text in line:
        text = cut(text, left)
        if text:
            kept.append((style, text))
        left -= cells(text)
    return kept


def _padded(text: str, width: int, align: str = "<") -> str:
    return fit(text, width, "right" if align == ">" else "left")


# --- tables ---


def _table(table: Table, width: int) -> list[Line]:
    """Draw a header and the rows; wide columns shrink first, then the last columns are dropped.

    Text in a last column to the left is wrapped, all else is cut.
    """
    rows = [[_one_line(str(cell)) for cell in row] for row in table.rows]
    header = [_one_line(name) for name in table.columns]
    widths = _widths([header, *rows], width)
    align = table.align or "<" * len(header)
    lines: list[Line] = [[("dim", _row(header, widths, align))]] if any(header) else []
    for row in rows:
        *kept, last = row[: len(widths)] or [""]
        wraps = bool(widths) and align[len(widths) - 1 : len(widths)] == "<"
        first, *rest = _wrapped(last, max(widths[-1], 1)) if wraps else [last]
        lines.append([("", _row([*kept, first], widths, align))])
        lines += [[("", _row([*([""] * len(kept)), more], widths, align))] for more in rest]
    return lines


def _row(row: Sequence[str], widths: Sequence[int], align: str) -> str:
    padded = [
        _padded(cell, width, side) for cell, width, side in zip(row, widths, align, strict=False) if width
    ]
    return (" " * GAP).join(padded).rstrip()


def _widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the width of each column. The last one keeps half of the line while others can shrink."""
    widths = [max(map(cells, column), default=0) for column in zip(*rows, strict=False)]
    while len(widths) > 1 and _total(widths) > width < len(widths) * (MIN_COLUMN + GAP) - GAP:
        widths.pop()
    while _total(widths) > width and max(widths) > 1:
        others = (
            widths[:-1] if widths[-1] <= width // 2 and max(widths[:-1], default=0) > MIN_COLUMN else widths
        )
        widths[widths.index(max(others))] -= 1
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * max(sum(map(bool, widths)) - 1, 0)


# --- pictures ---


def finite(values: Sequence[float]) -> list[float]:
    """Return `values` with 0 for negative and non-finite numbers."""
    return [value if math.isfinite(value) and value > 0 else 0.0 for value in values]


def sparkline(values: Sequence[float], levels: str = "▁▂▃▄▅▆▇█") -> str:
    """Return one character per value, the highest level for the largest."""
    known = finite(values)
    top = max(known, default=0.0)
    last = len(levels) - 1
    return "".join(levels[round(value / top * last) if top else 0] for value in known)


def bar(share: float, width: int, glyphs: _Glyphs) -> tuple[str, str]:
    """Return the filled and the empty part of a bar of `width` cells."""
    full, rest = divmod(round(min(max(share, 0.0), 1.0) * width * 2), 2)
    half = glyphs.half if rest else ""
    return glyphs.full * full + half, glyphs.empty * (width - full - len(half))


def _bars(bars: Bars, width: int, glyphs: _Glyphs) -> list[Line]:
    labels = [_one_line(row.label) for row in bars.rows]
    column = min(max(map(cells, labels), default=0), max(width // 3, MIN_COLUMN))
    texts = [_one_line(row.text) for row in bars.rows]
    free = width - column - max(map(cells, texts), default=0) - 2 * GAP
    length = max(min(free, BAR_CELLS), min(MIN_COLUMN, width // 4))
    values = finite([row.value for row in bars.rows])
    top = max([*values, *finite([bars.top])])
    lines: list[Line] = []
    for row, label, text, value in zip(bars.rows, labels, texts, values, strict=True):
        filled, empty = bar(value / top if top else 0.0, length, glyphs)
        name = _padded(label, column)
        lines.append([("", f"{name}  "), (row.style, filled), ("dim", empty), ("", f"  {text}")])
    return lines


def _gauge(gauge: Gauge, width: int, glyphs: _Glyphs) -> Line:
    share = gauge.done / gauge.total if gauge.total > 0 and math.isfinite(gauge.done) else 0.0
    length = max(min(BAR_CELLS, width // 3), 1)
    filled, empty = bar(share, length, glyphs)
    text = f" {min(max(share, 0.0), 1.0):4.0%}  {_one_line(gauge.text)}"
    return [("accent", filled), ("dim", empty), ("", text)]


def _curve(curve: Curve, width: int, glyphs: _Glyphs) -> list[Line]:
    """Draw one mark for each column, interpolated between the points, and the chosen point over them."""
    points = sorted((x, math.log10(y)) for x, y in {*curve.points, curve.chosen} if _is_plottable(x, y))
    if not points or not _is_plottable(*curve.chosen):
        return []
    (low_x, high_x), (low_y, high_y) = (_span(values) for values in zip(*points, strict=True))
    ticks = {0: _figure(10**high_y), CURVE_ROWS - 1: _figure(10**low_y)}
    margin = max(map(len, ticks.values()))
    columns = max(min(width - margin - 2, 2 * BAR_CELLS), 4)
    grid = [[" "] * columns for _ in range(CURVE_ROWS)]

    def put(x: float, y: float, mark: str) -> None:
        column = round((x - low_x) / (high_x - low_x) * (columns - 1))
        grid[round((high_y - y) / (high_y - low_y) * (CURVE_ROWS - 1))][column] = mark

    for column in range(columns):
        x = low_x + (high_x - low_x) * column / (columns - 1)
        put(x, _interpolate(points, x), "·")
    put(curve.chosen[0], math.log10(curve.chosen[1]), "X")
    lines: list[Line] = [[("dim", _one_line(curve.y_label))]]
    for y, row in enumerate(grid):
        axis = f"{ticks.get(y, ''):>{margin}} {glyphs.vertical}"
        lines.append([("dim", axis), ("accent", "".join(row).rstrip())])
    left, right = _figure(low_x), _one_line(f"{_figure(high_x)} {curve.x_label}")
    lines.append([("dim", f"{'':>{margin}} {glyphs.corner}{glyphs.horizontal * columns}")])
    lines.append([("dim", f"{'':>{margin}}  {left}{right:>{max(columns - len(left), len(right) + 1)}}")])
    return [*lines, [("accent", "X"), ("", f" {_chosen_text(curve)}")]]


def _is_plottable(x: float, y: float) -> bool:
    return abs(x) <= MAX_COORDINATE and 1e-100 <= y <= 1e100


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the y of the line through points in order of x."""
    after = next((i for i, (known, _) in enumerate(points) if known >= x), len(points) - 1)
    if after == 0 or points[after][0] <= x:
        return points[after][1]
    (x0, y0), (x1, y1) = points[after - 1 : after + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _chosen_text(curve: Curve) -> str:
    x, y = map(_figure, curve.chosen)
    return _one_line(f"{x} {curve.x_label}, {y} {curve.y_label}")


def _plot(plot: Plot, width: int, glyphs: _Glyphs) -> list[Line]:
    points = [p for p in plot.points if all(abs(value) <= MAX_COORDINATE for value in (p.x, p.y))][
        : len(MARKS)
    ]
    if not points:
        return []
    rows = PLOT_ROWS if len(points) > 2 else LOW_PLOT_ROWS
    low_y, high_y = _span([p.y for p in points])
    low_x, high_x = _span([p.x for p in points])
    ticks = {0: _figure(high_y), rows - 1: _figure(low_y)}
    margin = max(map(len, ticks.values()))
    columns = max(min(width - margin - 5 - cells(plot.x_label), 2 * BAR_CELLS), 4)
    grid = [[" "] * columns for _ in range(rows)]
    for mark, point in zip(MARKS, points, strict=False):
        x = round((point.x - low_x) / (high_x - low_x) * (columns - 1))
        y = round((high_y - point.y) / (high_y - low_y) * (rows - 1))
        place = min((i for i in range(columns) if grid[y][i] == " "), key=lambda i: abs(i - x), default=x)
        grid[y][place] = mark
    lines: list[Line] = [[("dim", _one_line(plot.y_label))]]
    for y, row in enumerate(grid):
        lines.append(
            [("dim", f"{ticks.get(y, ''):>{margin}} {glyphs.vertical}"), ("accent", "".join(row).rstrip())]
        )
    left, right = _figure(low_x), _figure(high_x)
    lines.append([("dim", f"{'':>{margin}} {glyphs.corner}{glyphs.horizontal * columns}")])
    scale = f"{left}{right:>{max(columns - len(left), len(right) + 1)}}"
    lines.append([("dim", f"{'':>{margin}}  {scale}  {_one_line(plot.x_label)}")])
    return [*lines, *_legend(plot, points)]


def _legend(plot: Plot, points: Sequence[Point]) -> Iterator[Line]:
    for mark, point in zip(MARKS, points, strict=False):
        where = f"{_figure(point.x)} {plot.x_label}, {_figure(point.y)} {plot.y_label}"
        yield [("accent", mark), ("", f" {_one_line(point.label)}"), ("dim", f"  {_one_line(where)}")]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest value, kept apart even if all are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1))


def _figure(value: float) -> str:
    return f"{value:.3g}"


# --- words ---


def _spoken(part: Part) -> list[str]:
    match part:
        case Table():
            return [_sentence(part, row) for row in part.rows]
        case Bars(rows):
            return [f"{row.label}: {row.text or _figure(row.value)}" for row in rows]
        case Spark(values, label):
            known = finite(values)
            return [f"{label}: {_figure(min(known))} to {_figure(max(known))}" if known else label]
        case Plot(points, x_label, y_label):
            return [f"{p.label}: {_figure(p.x)} {x_label}, {_figure(p.y)} {y_label}" for p in points]
        case Curve(points, _, x_label, y_label):
            figures = [f"{_figure(x)} {x_label}: {_figure(y)}" for x, y in points]
            return [f"{y_label} by size: {', '.join(figures)}", f"chosen: {_chosen_text(part)}"]
        case Trend():
            return trend_words(part)
        case Diff():
            return diff_words(part)
        case Gauge(done, total, text):
            return [f"{done / total if total else 0:.0%} {text}".rstrip()]
        case Lines(lines):
            return list(lines)
        case Markdown(source):
            return source.split("\n")


def _sentence(table: Table, row: Sequence[str]) -> str:
    """Return a row as a sentence, with the names of its columns if the table wants them."""
    names = table.columns if table.named else ()
    named = zip_longest(names, row, fillvalue="")
    return ", ".join(f"{name} {cell}".strip() for name, cell in named if cell)
