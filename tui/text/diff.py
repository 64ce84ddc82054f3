"""Two texts compared word by word: side by side where there is room, one below the other elsewhere.

Lines are paired first, and then the words of lines that were replaced. Words of one side only are coloured;
a sign at the beginning of a row says without colours that there are some.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

from .sanitise import breaks, cells, cut, printable

Line = list[tuple[str, str]]
Span = tuple[str, str]
BESIDE_COLUMNS = 80  # from this width on the texts stand side by side
MIN_COLUMNS = 8
BETWEEN = " │ "
# beyond so many, words are not compared, and lines less thoroughly: that takes the square of their number
MAX_WORDS, MAX_LINES = 3_000, 4_000
_WORDS = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")
Sign = Literal[" ", "-", "+", "~"]


@dataclass(frozen=True)
class Diff:
    """Two texts with their names."""

    before: str
    after: str
    before_name: str
    after_name: str


class Pair(NamedTuple):
    """A line of each text as spans, None where one has none; styles are "", bad (gone) and good (new)."""

    left: list[Span] | None
    right: list[Span] | None
    sign: Sign


def pairs(before: str, after: str) -> Iterator[Pair]:
    """Yield the lines of both texts, paired."""
    old, new = before.split("\n"), after.split("\n")
    huge = len(old) + len(new) > MAX_LINES
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=huge).get_opcodes():
        if kind == "equal":
            yield from (Pair([("", line)], [("", line)], " ") for line in old[a:b])
            continue
        paired = min(b - a, d - c)
        for left, right in zip(old[a : a + paired], new[c : c + paired], strict=True):
            yield Pair(*_words(left, right), "~")
        yield from (Pair([("bad", line)], None, "-") for line in old[a + paired : b])
        yield from (Pair(None, [("good", line)], "+") for line in new[c + paired : d])


def _words(left: str, right: str) -> tuple[list[Span], list[Span]]:
    """Return both lines with the words that only one of them has coloured."""
    old, new = _WORDS.findall(left), _WORDS.findall(right)
    if len(old) + len(new) > MAX_WORDS:
        return [("bad", left)], [("good", right)]
    lefts: list[Span] = []
    rights: list[Span] = []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        same = kind == "equal"
        lefts.append(("" if same else "bad", "".join(old[a:b])))
        rights.append(("" if same else "good", "".join(new[c:d])))
    return _spans(lefts), _spans(rights)


def _spans(spans: Sequence[Span]) -> list[Span]:
    return [span for span in spans if span[1]]


def diff_lines(diff: Diff, width: int) -> list[Line]:
    """Draw the difference in at most `width` cells."""
    texts = (_clean(diff.before), _clean(diff.after))
    if texts[0] == texts[1]:
        return [[("dim", "both say the same")]]
    found = list(pairs(*texts))
    names = tuple(" ".join(printable(name).split()) for name in (diff.before_name, diff.after_name))
    return _beside(found, names, width) if width >= BESIDE_COLUMNS else _below(found, names, width)


def _clean(text: str) -> str:
    return printable(text).expandtabs(4).rstrip()


def _beside(found: Sequence[Pair], names: Sequence[str], width: int) -> list[Line]:
    column = (width - len(BETWEEN) - 4) // 2
    lines: list[Line] = [_row([("dim", names[0])], [("dim", names[1])], " ", column)]
    for pair in found:
        lefts, rights = _wrapped(pair.left or [], column), _wrapped(pair.right or [], column)
        for place in range(max(len(lefts), len(rights), 1)):
            left = lefts[place] if place < len(lefts) else []
            right = rights[place] if place < len(rights) else []
            lines.append(_row(left, right, pair.sign, column))
    return lines


def _row(left: Line, right: Line, sign: Sign, column: int) -> Line:
    cut_left, cut_right = _cut(left, column), _cut(right, column)
    gap = " " * (column - sum(cells(text) for _, text in cut_left))
    gone, new = "- " if sign in "-~" else "  ", "+ " if sign in "+~" else "  "
    return [("bad", gone), *cut_left, ("", gap), ("dim", BETWEEN), ("good", new), *cut_right]


def _below(found: Sequence[Pair], names: Sequence[str], width: int) -> list[Line]:
    lines: list[Line] = [[("bad", f"- {names[0]}")], [("good", f"+ {names[1]}")]]
    for pair in found:
        if pair.sign == " ":
            lines += [[("", "  "), *row] for row in _wrapped(pair.left or [], width - 2) or [[]]]
            continue
        lines += [[("bad", "- "), *row] for row in _wrapped(pair.left or [], width - 2)]
        lines += [[("good", "+ "), *row] for row in _wrapped(pair.right or [], width - 2)]
    return [_cut(line, width) for line in lines]


def _wrapped(spans: Sequence[Span], width: int) -> list[Line]:
    """Wrap spans to rows of at most `width` cells; an empty line is one row, no line none."""
    text = "".join(text for _, text in spans)
    rows: list[Line] = []
    for start, end in breaks(text, max(width, MIN_COLUMNS)):
        row: Line = []
        at = 0
        for style, part in spans:
            first, last = max(start - at, 0), min(end - at, len(part))
            if first < last:
                row.append((style, part[first:last]))
            at += len(part)
        rows.append(row)
    return rows if spans else []


def _cut(line: Line, width: int) -> Line:
    kept: Line = []
    left = width
    for style, text in line:
        size = cells(text)
        if size > left:
            text = cut(text, left)
            size = cells(text)
        if text:
            kept.append((style, text))
        left -= size
    return kept


def diff_words(diff: Diff) -> list[str]:
    """Return the difference in sentences: what both say is left out."""
    said = []
    for number, pair in enumerate(pairs(_clean(diff.before), _clean(diff.after)), 1):
        if pair.sign == " ":
            continue
        gone, new = (
            "".join(text for _, text in spans).strip() if spans else "" for spans in (pair.left, pair.right)
        )
        parts = [f"{diff.before_name}: {gone}"] * bool(gone) + [f"{diff.after_name}: {new}"] * bool(new)
        if parts:
            said.append(f"line {number}, {'; '.join(parts)}")
    return said or ["both say the same"]
