"""Splits growing Markdown into finished pieces, which nothing later can change, and an open rest.

Blocks end where the next one begins, lists item by item; a fence is given out in chunks while it is open.
Knows nothing of widths and styles. The text must be printable already.
"""

from dataclasses import dataclass

from .highlight import CHUNK
from .parser import NO_LEAD, WIDTH_ROWS, Lead, closes, first_line, is_open_fence, last_line, parse, units

MAX_LINE = 4_096  # characters of text, not code, in one line: a longer one becomes several paragraphs


@dataclass(frozen=True)
class Piece:
    """Part of the text: blocks or items, or lines of a fence if `fence` is given."""

    source: str
    lead: Lead = NO_LEAD
    fence: "Part | None" = None


@dataclass(frozen=True)
class Part:
    """The part of a fence that a piece is; the last one brings the whole code for highlighting."""

    info: str
    opening: bool
    whole: str | None = None


class Splitter:
    """Takes text and returns finished pieces, each once; keeps the rest."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._partial = ""
        self._lead = NO_LEAD
        self._fence: _Fence | None = None

    def feed(self, text: str) -> list[Piece]:
        *ended, self._partial = (self._partial + text).split("\n")
        pieces: list[Piece] = []
        for line in ended:
            pieces += self._add(line)
        pieces += self._freeze()
        if self._fence is None and len(self._partial) > MAX_LINE:
            *paragraphs, self._partial = _paragraphs(self._partial)
            self._lines += paragraphs
            pieces += self._freeze()
        return pieces

    def finish(self) -> list[Piece]:
        """Return the rest, at the end of the text."""
        return [*self.feed("\n" if self._partial.strip(" \t") else ""), *self.rest]

    @property
    def rest(self) -> list[Piece]:
        """Return the open piece, or None if it is empty."""
        if self._fence is not None:
            return self._fence.rest(self._partial, self._lead)
        source = "\n".join([*self._lines, self._partial])
        return [Piece(source, self._lead)] if source.strip(" \t\n") else []

    def _add(self, line: str) -> list[Piece]:
        pieces = []
        if len(line) > MAX_LINE:
            pieces = self._freeze()
        if self._fence is None:
            self._lines += _paragraphs(line)
            return pieces
        pieces += self._fence.add(line, self._lead)
        if self._fence.closed:
            self._fence, self._lead = None, Lead(gap=True)
        return pieces

    def _freeze(self) -> list[Piece]:
        """Release all but the last unit of the open lines; if that is a fence, enter it."""
        if self._fence is not None or not self._lines:
            return []
        found = units(parse("\n".join(self._lines)), self._lead)
        if not found:
            return []
        last = found[-1]
        start = first_line(last.node)
        pieces = [Piece("\n".join([*self._lines[:start], ""]), self._lead)] if len(found) > 1 else []
        self._lines = self._lines[start:]
        if pieces:
            self._lead = Lead(last.gap, last.number)
        if is_open_fence(last.node, [*[""] * start, *self._lines]):
            self._fence = _Fence(last.node.info, last.node.markup, self._lines[0])
            code, self._lines = self._lines[1:], []
            pieces += [piece for line in code for piece in self._fence.add(line, self._lead)]
        elif last.node.type == "table":
            pieces += self._freeze_rows(last_line(last.node) - start)
        return pieces

    def _freeze_rows(self, end: int) -> list[Piece]:
        """Release all rows but the last of a long open table; the rest repeats the header."""
        pieces = []
        head, rows = self._lines[:2], self._lines[2:end]
        if not self._lead.table and len(rows) > WIDTH_ROWS:
            first = "\n".join([*head, *rows[:WIDTH_ROWS]])
            pieces.append(Piece(first, self._lead))
            self._lead, rows = Lead(table=first), rows[WIDTH_ROWS:]
        if self._lead.table and len(rows) > 1:
            pieces.append(Piece("\n".join([*head, *rows[:-1]]), self._lead))
            rows = rows[-1:]
        self._lines[2:end] = rows
        return pieces


class _Fence:
    """The open fence: its lines so far, and how many of them were released."""

    def __init__(self, info: str, markup: str, first: str) -> None:
        self.closed = False
        self._info, self._markup = info, markup
        self._indent = len(first) - len(first.lstrip(" "))
        self._code: list[str] = []
        self._given = 0

    def add(self, line: str, lead: Lead) -> list[Piece]:
        self.closed = closes(self._markup, line)
        if self.closed:
            return [self._piece(self._code, lead, closing=True)]
        self._code.append(self._unindented(line))
        if len(self._code) - self._given < CHUNK:
            return []
        piece = self._piece(self._code, lead, closing=False)
        self._given = len(self._code)
        return [piece]

    def rest(self, partial: str, lead: Lead) -> list[Piece]:
        if closes(self._markup, partial):
            return [self._piece(self._code, lead, closing=True)]
        code = [*self._code, self._unindented(partial)] if partial.strip(" \t") else self._code
        return [self._piece(code, lead, closing=False)]

    def _piece(self, code: list[str], lead: Lead, *, closing: bool) -> Piece:
        whole = "".join(f"{line}\n" for line in code) if closing else None
        source = "".join(f"{line}\n" for line in code[self._given :])
        return Piece(source, lead, Part(self._info, self._given == 0, whole))

    def _unindented(self, line: str) -> str:
        """Remove the fence's own indent; a tab that is only partly removed leaves spaces."""
        at = column = 0
        while column < self._indent and line[at : at + 1] in (" ", "\t"):
            column += 1 if line[at] == " " else 4 - column % 4
            at += 1
        return " " * max(column - self._indent, 0) + line[at:]


def _paragraphs(line: str) -> list[str]:
    """Return a line unchanged, or a far too long one as paragraphs cut at spaces."""
    parts = []
    while len(line) > MAX_LINE:
        at = line.rfind(" ", 1, MAX_LINE) + 1 or MAX_LINE
        parts += [line[:at], ""]
        line = line[at:]
    return [*parts, line]
