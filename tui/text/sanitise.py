"""Sanitise, measure and wrap untrusted text.

Knows no colours, widgets or Markdown. Widths are those of `rich.cells`, which the app's screen counts with.
"""

import re
from collections.abc import Iterator

_EMOJI = "\u2190-\u2bff\U0001f000-\U0001faff"
# escape sequences; C0 but tab and newline, DEL and C1; soft hyphens, line separators, what overrides the
# direction of reading or annotates, noncharacters, halves of surrogate pairs (they cannot be encoded);
# joiners outside emoji, since terminals disagree with every table about the width of what they join
_UNPRINTABLE = re.compile(
    r"\x1b\[[0-?]{0,64}[ -/]{0,8}[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\xad]|[\u2028-\u202e\u2066-\u2069]"
    rf"|[\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]|(?<![{_EMOJI}\ufe0f])\u200d|\u200d(?![{_EMOJI}])"
)
_UNFINISHED = re.compile(r"(?:\x1b(?:\[[0-?]{0,64}[ -/]{0,8})?|\u200d)\Z")

_OPENING = "（［｛「『《〈【〔"
_CLOSING = "、。，．：；？！）］｝」』》〉】〕ー々"
# scripts without spaces between words: a line may end after any of these letters
_WIDE = "\u2e80-\u303e\u3041-\u312f\u31a0-\ua4cf\uf900-\ufaff\ufe30-\ufe6f\uff01-\uff60\U00020000-\U0003fffd"
_CHUNKS = re.compile(rf"[ \t]+|[{_OPENING}]*[{_WIDE}][{_CLOSING}]*|[^ \t{_WIDE}]+[{_CLOSING}]*")


def printable(text: str) -> str:
    """Remove whatever could move the cursor, recolour, reorder, or control the terminal.

    Newlines and tabs stay; line separators become newlines, halves of surrogate pairs U+FFFD.
    """
    bare = text.replace("\n", "").replace("\t", "")
    if bare.isascii() and bare.isprintable():  # most text, fifty times faster
        return text
    return _UNPRINTABLE.sub(_replacement, text)


def _replacement(match: re.Match[str]) -> str:
    character = match.group()
    if character in "\u2028\u2029":
        return "\n"
    return "\ufffd" if "\ud800" <= character <= "\udfff" else ""


class Cleaner:
    """A stateful `printable` for text in pieces: the joined results equal the result for the whole text."""

    def __init__(self) -> None:
        self._held = ""
        self._last = ""

    def feed(self, text: str) -> str:
        """Return the sanitised text; an unfinished sequence is held back."""
        text = self._held + text
        unfinished = _UNFINISHED.search(text)
        self._held = unfinished.group() if unfinished else ""
        return self._clean(text[: len(text) - len(self._held)])

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return self._clean(held)

    def _clean(self, text: str) -> str:
        clean = printable(self._last + text)[len(self._last) :]
        self._last = clean[-1:] or self._last
        return clean


def cells(text: str) -> int:
    """Count the terminal cells of `text`, one line without control characters."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # most text is ASCII, and the command line starts faster without

    return cell_len(text)


def graphemes(text: str) -> list[tuple[int, int, int]]:
    """Return (start, end, cells) of each grapheme; together they cover the text."""
    from rich.cells import split_graphemes

    return split_graphemes(text)[0]


def cut(text: str, width: int) -> str:
    """Truncate `text` to `width` cells, with `…` at the end."""
    if cells(text) <= width:
        return text
    if width < 1:
        return ""
    start = text[: chop(text, width - 1)[0][1]]
    return start + "…" if cells(start) < width else "…"


def fit(text: str, width: int, align: str = "left") -> str:
    """Truncate or pad `text` to exactly `width` cells; `align` is left, right or center."""
    text = cut(text, width)
    free = width - cells(text)
    before = {"left": 0, "right": free, "center": free // 2}[align]
    return " " * before + text + " " * (free - before)


def chop(text: str, width: int) -> list[tuple[int, int]]:
    """Return ranges of `text` of at most `width` cells, at least one character, that may cut words."""
    width = max(width, 1)
    if text.isascii():
        return [(at, min(at + width, len(text))) for at in range(0, len(text), width)] or [(0, 0)]
    ranges, start, used = [], 0, 0
    for begin, _, size in graphemes(text):
        if used + size > width and begin > start:
            ranges.append((start, begin))
            start, used = begin, 0
        used += size
    return [*ranges, (start, len(text))]


def breaks(text: str, width: int) -> list[tuple[int, int]]:
    """Return ranges of one line of `text` of at most `width` cells, cut at spaces if possible.

    The space between two ranges is the one that the line break replaces.
    """
    if cells(text) <= width:
        return [(0, len(text))]
    return list(_breaks(text, max(width, 1)))


def _breaks(text: str, width: int) -> Iterator[tuple[int, int]]:
    start, end, used = 0, 0, 0
    for match in _CHUNKS.finditer(text):
        chunk, size = match.group(), cells(match.group())
        if chunk[0] in " \t":
            used += size
            continue
        if used + size > width:
            if end > start:
                yield start, end
            start, used = match.start(), 0
        if size > width:
            *full, (begin, _) = ((match.start() + a, match.start() + b) for a, b in chop(chunk, width))
            yield from full
            start, size = begin, cells(text[begin : match.end()])
        used += size
        end = match.end()
    yield start, max(start, end)


def wrap(text: str, width: int) -> list[str]:
    """Wrap every line of `text` to at most `width` cells."""
    return [line[start:end] for line in text.split("\n") for start, end in breaks(line, width)]
