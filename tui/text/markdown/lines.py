"""Lines of styled text: their parts, layout and copying.

Styles are names, joined by spaces where several apply; what a name looks like is a theme's business.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..sanitise import breaks, cells, chop, graphemes


class Span(NamedTuple):
    """A run of text in one style.

    `copy` is what a selection of it yields where that is not its text: nothing for decoration. `action` names
    what a click on it does; "link URL" marks a web address.
    """

    text: str
    style: str = ""
    copy: str | None = None
    action: str = ""


class Line(NamedTuple):
    """One row. In copied text `joint` separates it from the row before: a newline unless a long line was
    wrapped."""

    spans: tuple[Span, ...]
    joint: str = "\n"


BLANK = Line(())


@dataclass(frozen=True)
class Frame:
    """The room in cells: `width` for text, `wide` (at least as much) for code and tables."""

    width: int
    wide: int

    def less(self, indent: int) -> "Frame":
        """Return the room beside an indent, never too little to show anything."""
        return Frame(max(self.width - indent, 8), max(self.wide - indent, 8))


def plain(line: Line) -> str:
    return "".join(span.text for span in line.spans)


def copied(line: Line, start: int = 0, end: int | None = None) -> str:
    """Return the copied text of the characters from `start` to `end` of the row."""
    parts, at = [], 0
    for span in line.spans:
        first, last = max(start - at, 0), len(span.text) if end is None else min(end - at, len(span.text))
        if first < last:
            parts.append(span.text[first:last] if span.copy is None else span.copy)
        at += len(span.text)
    return "".join(parts)


def width_of(spans: Iterable[Span]) -> int:
    return sum(cells(span.text) for span in spans)


def styled(spans: Iterable[Span], style: str) -> list[Span]:
    """Add a style to the spans."""
    return [Span(text, f"{own} {style}" if own else style, copy, action) for text, own, copy, action in spans]


def prefixed(lines: Sequence[Line], first: Span, rest: Span) -> list[Line]:
    """Prefix the first line with a marker and the others with the space below it."""
    done = []
    for number, line in enumerate(lines):
        mark = first if number == 0 else rest
        if not line.spans:
            mark = mark._replace(copy=(mark.text if mark.copy is None else mark.copy).rstrip())
        if line.joint != "\n" and number:
            mark = mark._replace(copy="")
        done.append(Line((mark, *line.spans), line.joint))
    return done or [Line((first,))]


def lay(spans: Sequence[Span], width: int) -> list[Line]:
    """Wrap `spans` to lines of at most `width` cells, at spaces and newlines."""
    return list(_laid(spans, breaks, width))


def lay_hard(spans: Sequence[Span], width: int) -> list[Line]:
    """Wrap code: break wherever a line is full."""
    return list(_laid(spans, chop, width))


def _laid(spans: Sequence[Span], ranges, width: int) -> Iterator[Line]:
    text = "".join(span.text for span in spans)
    if "\t" in text:
        spans = [span._replace(text=span.text.replace("\t", " ")) for span in spans]
        text = text.replace("\t", " ")
    cutter = _Cutter(_snapped(spans, text) if "\ufe0f" in text or "\u200d" in text else spans)
    begin = 0
    for source in text.split("\n"):
        joint, last = "\n", begin
        for start, end in ranges(source, width):
            if start:
                joint = " " if begin + start > last else ""
            last = begin + end
            yield Line(cutter.take(begin + start, last), joint)
        begin += len(source) + 1


class _Cutter:
    """Cuts ascending ranges out of consecutive spans."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans, self._index, self._begin = spans, 0, 0

    def take(self, start: int, end: int) -> tuple[Span, ...]:
        taken = []
        while start < end:
            span = self._spans[self._index]
            stop = self._begin + len(span.text)
            if start >= stop:
                self._begin, self._index = stop, self._index + 1
                continue
            upto = min(end, stop)
            taken.append(_part(span, start - self._begin, upto - self._begin))
            start = upto
        return tuple(taken)


def _part(span: Span, start: int, end: int) -> Span:
    if end - start == len(span.text):
        return span
    return span._replace(text=span.text[start:end], copy=span.copy if start == 0 or span.copy is None else "")


def _snapped(spans: Sequence[Span], text: str) -> list[Span]:
    """Move the borders of spans to whole graphemes: half an emoji has another width."""
    starts = {start for start, _, _ in graphemes(text)} | {len(text)}
    snapped, begin, at = [], 0, 0
    for span in spans:
        at += len(span.text)
        end = next(place for place in range(max(at, begin), len(text) + 1) if place in starts)
        if end > begin:
            snapped.append(span._replace(text=text[begin:end]))
        begin = end
    return snapped
