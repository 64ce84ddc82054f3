"""The output of the line-based chat: answers as Markdown, notes and reports; text is only ever appended.

A row is written once nothing that follows can change it. Text from models and files passes `printable`. There
are plainer forms for output without colours, without Unicode, and for screen readers.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

from ..text.markdown.lines import Frame, Line
from ..text.markdown.render import render
from ..text.markdown.splitter import Piece, Splitter
from ..text.output import OutputError
from ..text.report import Report, report_lines, report_text
from ..text.sanitise import Cleaner, printable
from ..user.sequences import link

MEASURE = 100
MIN_WIDTH = 20
PROGRESS_AFTER_SECONDS = 1.0
# signs that could change the layout of the words before them
MARKUP = re.compile(r"[*_`<>\[\]|~$\\&!]")
BOLD, DIM, RED, GREEN, YELLOW, BLUE, CYAN = "1", "2", "31", "32", "33", "34", "36"
INK: Mapping[str, str] = {
    "title": BOLD, "dim": DIM, "accent": CYAN, "good": GREEN, "warn": YELLOW, "bad": RED, "bar": CYAN,
    "h1": BOLD, "h2": BOLD, "h3": BOLD, "h4": BOLD, "h5": BOLD, "h6": BOLD, "strong": BOLD, "em": "3",
    "code": CYAN, "math": CYAN, "address": BLUE, "bullet": CYAN, "quote": DIM, "rule": DIM, "copy": DIM,
    "token:Keyword": "35", "token:Comment": DIM, "token:Literal": GREEN,
}  # fmt: skip
NOTE_INK = {"info": "dim", "warning": "warn", "error": "bad"}


class Flow:
    """Lays out a growing Markdown text; returns each row as soon as nothing can change it."""

    def __init__(self, frame: Frame):
        self._frame = frame
        self._splitter = Splitter()
        self._given = 0  # rows of the open pieces that were returned already

    def feed(self, text: str) -> list[Line]:
        rows = self._finished(self._splitter.feed(text))
        for piece in self._splitter.rest:
            laid = render(piece, self._frame)
            certain = laid[: _certain(piece, len(laid))]
            rows += certain[self._given :]
            self._given = max(self._given, len(certain))
        return rows

    def finish(self) -> list[Line]:
        return self._finished(self._splitter.finish())

    def _finished(self, pieces: list[Piece]) -> list[Line]:
        """Return the rows of `pieces` that were not returned while they were open."""
        rows: list[Line] = []
        for piece in pieces:
            laid = render(piece, self._frame)
            rows += laid[self._given :]
            self._given = max(self._given - len(laid), 0)
        return rows


def _certain(piece: Piece, rows: int) -> int:
    """Return how many rows of an open piece are final: of code all but one, of plain words all but two."""
    if piece.fence is not None:
        return rows - 1
    return 0 if MARKUP.search(piece.source) else max(rows - 2, 0)


@dataclass(frozen=True)
class Form:
    """The form of the output on a terminal, or on what stands in its place."""

    colour: bool
    unicode: bool
    drawn: bool  # whether Markdown is laid out and pictures are drawn; else the text is written as it comes
    width: int = MEASURE

    @classmethod
    def of(
        cls, stream: TextIO, *, spoken: bool, measure: int, env: Mapping[str, str] | None = None
    ) -> "Form":
        """Return the form for `stream` as it is now."""
        env = os.environ if env is None else env
        terminal = stream.isatty() and env.get("TERM", "dumb") not in ("", "dumb")
        columns = shutil.get_terminal_size().columns
        return cls(
            colour=terminal and not spoken and not env.get("NO_COLOR"),
            unicode="utf" in (stream.encoding or "").lower(),
            drawn=terminal and not spoken,
            width=max(min(columns, measure or columns), MIN_WIDTH),
        )


class Printer:
    """Writes the conversation to stdout and notes about it to stderr."""

    def __init__(self, *, spoken: bool = False, measure: int = MEASURE):
        self.spoken, self._measure = spoken, measure
        self._flow: Flow | None = None
        self._cleaner = Cleaner()
        self._told, self._begun = ("", 0), 0.0  # the progress written last, and since when it is watched
        self._column = 0  # 0 at the beginning of a line of stdout, else 1

    @property
    def form(self) -> Form:
        return Form.of(sys.stdout, spoken=self.spoken, measure=self._measure)

    # answers

    def begin_answer(self) -> None:
        form = self.form
        self._cleaner = Cleaner()
        self._flow = Flow(Frame(form.width, form.width)) if form.drawn and form.unicode else None

    def answer(self, text: str) -> None:
        """Write a piece of the answer."""
        if not sys.stdout.isatty():
            self.raw(text)
            return
        text = self._cleaner.feed(text)
        if self._flow is None:
            self.raw(text)
        else:
            self._rows(self._flow.feed(text))

    def end_answer(self) -> None:
        rest = self._cleaner.flush() if sys.stdout.isatty() else ""
        if self._flow is None:
            self.raw(rest)
        else:
            self._rows([*self._flow.feed(rest), *self._flow.finish()])
        self._flow = None
        self.fresh_line()

    def _rows(self, rows: list[Line]) -> None:
        form = self.form
        for row in rows:
            spans = [
                (span.style, span.text if span.style != "copy" else "─" * len(span.text), span.action)
                for span in row.spans
            ]
            self.raw("".join(_linked(*span, form.colour) for span in _stripped(spans)) + "\n")

    # everything else

    def thought(self, text: str) -> None:
        """Write a piece of a thought."""
        self.raw(_inked("dim", printable(text), self.form.colour))

    def note(self, text: str, kind: str = "info") -> None:
        """Write one sentence to stderr."""
        self.fresh_line()
        colour = self.form.colour and sys.stderr.isatty()
        _write(sys.stderr, _inked(NOTE_INK[kind], f"{_label(kind)}{printable(text)}", colour) + "\n")

    def report(self, report: Report) -> None:
        self.fresh_line()
        form = self.form
        if not form.drawn:
            self.raw(report_text(report) + "\n")
            return
        for line in report_lines(report, form.width, form.unicode):
            self.raw("".join(_inked(style, text, form.colour) for style, text in line) + "\n")

    def line(self, text: str, style: str = "") -> None:
        """Write a line of ours."""
        self.fresh_line()
        self.raw(_inked(style, printable(text), self.form.colour) + "\n")

    def progress(self, what: str, share: float) -> None:
        """Write one more tenth of `what` on its line, once it takes noticeably long."""
        now, tenth = time.monotonic(), int(10 * share)
        if (what, tenth) < self._told[:2] or what != self._told[0]:
            self._told, self._begun = (what, tenth), now
            return
        if tenth > self._told[1] and now - self._begun > PROGRESS_AFTER_SECONDS:
            self._told = (what, tenth)
            words = "" if self._column else f"{what}:"
            self.raw(_inked("dim", f"{words} {10 * tenth}%", self.form.colour))

    def fresh_line(self) -> None:
        """Begin a new line, unless one has just begun."""
        if self._column:
            self.raw("\n")

    def raw(self, text: str) -> None:
        """Write `text`, which is printable but for our own colours."""
        if text:
            _write(sys.stdout, text)
            self._column = 0 if text.endswith("\n") else 1


def _label(kind: str) -> str:
    """Return the word that says without colour what is wrong."""
    return "" if kind == "info" else f"{kind}: "


def _stripped(spans: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return the spans of a row without the spaces at its end."""
    while spans and not spans[-1][1].strip():
        spans = spans[:-1]
    if not spans:
        return []
    style, text, action = spans[-1]
    return [*spans[:-1], (style, text.rstrip(), action)]


def _linked(style: str, text: str, action: str, colour: bool) -> str:
    """Return `text` in its colours, as a link that can be clicked if it is a web address."""
    kind, _, address = action.partition(" ")
    inked = _inked(style, text, colour)
    return link(inked, address) if kind == "link" and address else inked


def _inked(style: str, text: str, colour: bool) -> str:
    """Return `text` in the colours of `style`, if there are any; newlines stay outside of them."""
    codes = [code for name in style.split(" ") for code in _codes(name)] if colour else []
    if not codes or not text.strip():
        return text
    return "\n".join(f"\x1b[{';'.join(codes)}m{part}\x1b[0m" if part else "" for part in text.split("\n"))


def _codes(name: str) -> Iterator[str]:
    """Yield the code of a style, or of its kind: the token Literal.Number is a Literal."""
    code = INK.get(name) or INK.get(name.split(".", 1)[0])
    if code:
        yield code


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output could not be written: {error.strerror}") from error
