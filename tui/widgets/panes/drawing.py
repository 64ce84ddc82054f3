"""Small drawings as styled lines: columns over time, stacked bars, items that flow over rows."""

from collections.abc import Sequence
from itertools import pairwise

from ...text.report import Line, finite
from ...text.sanitise import cells, cut

EIGHTHS = " ▁▂▃▄▅▆▇█"
DOTS = "·"


def line_cells(line: Line) -> int:
    return sum(cells(text) for _, text in line)


def cut_line(line: Line, width: int) -> Line:
    """Return `line` cut to `width` cells."""
    kept: Line = []
    for style, text in line:
        room = width - line_cells(kept)
        if room > 0 and text:
            kept.append((style, cut(text, room)))
    return kept


def spread(left: Line, right: Line, width: int) -> Line:
    """Return both in one line, `right` flush right; where they do not fit, `right` is left out."""
    if not right:
        return cut_line(left, width)
    gap = width - line_cells(left) - line_cells(right)
    return [*left, ("", " " * gap), *right] if gap > 0 else cut_line(left, width)


def flow(items: Sequence[Line], width: int, rows: int) -> list[Line]:
    """Return the items side by side on as few of `rows` as they need; items that do not fit are left out."""
    lines: list[Line] = []
    for item in items:
        if line_cells(item) > width:
            continue
        if lines and line_cells(lines[-1]) + 2 + line_cells(item) <= width:
            lines[-1] += [("", "  "), *item]
        elif len(lines) < rows:
            lines.append(list(item))
    return lines


def resample(values: Sequence[float], count: int) -> list[float]:
    """Return `values`, or the means of `count` equal parts of them if there are more."""
    known = finite(values)
    if len(known) <= count or count <= 0:
        return known[: max(count, 0)]
    ends = [place * len(known) // count for place in range(count + 1)]
    return [sum(known[first:last]) / (last - first) for first, last in pairwise(ends)]


def columns(values: Sequence[float], rows: int, top: float = 0.0) -> list[str]:
    """Return one column per value, `rows` high and scaled to the largest value or `top`, as rows of text."""
    known = finite(values)
    top = max([top, *known])
    eighths = [round(value / top * rows * 8) if top else 0 for value in known]
    levels = [max(1, level) for level in eighths]  # a column of nothing still shows that time passed
    return [
        "".join(EIGHTHS[min(8, max(0, level - 8 * below))] for level in levels)
        for below in range(rows - 1, -1, -1)
    ]


def stacked(parts: Sequence[tuple[str, str, float]], total: float, width: int) -> Line:
    """Return a bar of `width` cells for `total`; each part has a style, a character and its amount.

    A part that is more than nothing has at least one cell where the bar has room.
    """
    line: Line = []
    used, so_far = 0, 0.0
    for style, character, value in parts:
        so_far += max(value, 0.0)
        end = round(min(so_far / total, 1.0) * width) if total > 0 else 0
        length = max(end - used, 1 if value > 0 else 0)
        length = min(length, width - used)
        if length > 0:
            line.append((style, character * length))
            used += length
    return [*line, ("track", DOTS * (width - used))] if used < width else line


def marked(line: Line, place: int, style: str, character: str) -> Line:
    """Return `line`, of characters one cell wide, with the one at `place` replaced."""
    result: Line = []
    at = 0
    for own, text in line:
        here = place - at
        parts = [(own, text)]
        if 0 <= here < len(text):
            parts = [(own, text[:here]), (style, character), (own, text[here + 1 :])]
        result += [part for part in parts if part[1]]
        at += len(text)
    return result


# --- figures ---


def format_nbytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
