"""The blocks of a transcript and the lines of each: questions, thoughts, answers, notes.

Knows neither widgets nor colours. Text from models and files is made printable on its way in.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ....core.conversation.summary import Turn
from ...text.figures import format_tokens
from ...text.markdown import Code, Frame, Line, Span, Stream, code_blocks, document
from ...text.markdown.lines import lay, styled, width_of
from ...text.markdown.table import FOLDED, TABLE
from ...text.sanitise import Cleaner, cells, cut, printable
from ...user.attachments import Attached, split_attached
from .thumbnails import Draw, draw_blocks, picture_lines, size_in_cells

Thoughts = Literal["folded", "open", "live"]
NoteKind = Literal["info", "warning", "error"]

CHARACTERS_PER_TOKEN = 4  # of English and of code, roughly
_FOLDED_TABLES = "⇔ wide table: click it, or shift+tab t"
_LIVE_LINES = 3
_FOLDED_LINES = 12
_MARKS = {"info": "·", "warning": "▲", "error": "✖"}
_ENDINGS = {
    "cancelled": "■ stopped",
    "length": "■ the token limit cut this off",
    "full": "■ cut off",
    "empty": "(empty answer)",
    "error": "✖ this reply failed",
}


@dataclass(frozen=True)
class Look:
    """What the lines of a block depend on besides its content."""

    frame: Frame
    thoughts: Thoughts = "live"
    draw: Draw = draw_blocks


class Block:
    """A part of a turn, as lines that are kept until content or look change; `opened` overrules the look."""

    margin = Span("  ", "", "")
    foldable = False
    is_extra = False  # whether the block stands between turns
    depends_on_display = False  # whether the lines depend on how thoughts are displayed

    def __init__(self, turn: int = 0) -> None:
        self.turn = turn
        self.opened: bool | None = None
        self.strips: dict[int, Any] = {}
        self._key: Look | Frame | None = None
        self._lines: list[Line] = []

    @property
    def text(self) -> str:
        """The text that copying yields and finding searches."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The name of the block in messages: `answer 3`."""
        kind = type(self).__name__.lower()
        return f"{kind} {self.turn}" if self.turn else kind

    def build(self, look: Look) -> list[Line]:
        raise NotImplementedError

    def lines(self, look: Look) -> list[Line]:
        key = look if self.depends_on_display else look.frame
        if key != self._key:
            self.forget()
            self._lines, self._key = self.build(look), key
        return self._lines

    def row(self, index: int, look: Look) -> Line:
        """Return a row with its margin; an empty one after the last line."""
        lines = self.lines(look)
        if index >= len(lines):
            return Line(())
        line = lines[index]
        return Line((self.margin, *line.spans), line.joint)

    def height(self, look: Look) -> int:
        """Return the number of rows, with the empty one before the next block."""
        count = len(self.lines(look))
        return count + 1 if count else 0

    def guess(self, look: Look) -> int:
        """Estimate the number of rows without laying them out."""
        text = self.text
        return text.count("\n") + len(text) // look.frame.width + 2

    def forget(self) -> None:
        """Drop the lines, which can be laid out again."""
        self._key, self._lines = None, []
        self.strips.clear()

    def codes(self) -> list[Code]:
        return []

    @property
    def markdown(self) -> str:
        """The source of its tables; empty for what has none."""
        return ""

    def is_open(self, _look: Look) -> bool:
        """Whether the whole block is shown."""
        return bool(self.opened)

    def flush(self) -> None:
        """Add what was fed to the lines."""

    def end(self) -> None:
        """Complete the block; nothing more will be fed."""


class Question(Block):
    """A question in bold on a band behind a bar, with number, time, and its place among its siblings."""

    margin = Span("▌ ", "bar band", "")
    foldable = True

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn.number)
        self._text = printable(turn.question).rstrip()
        self._typed, self._files = split_attached(self._text)
        self._created = turn.created
        self.siblings = place_of(turn)
        self.pictures = turn.pictures

    def update(self, turn: Turn) -> None:
        """Show the facts of the turn as it was stored; the text stays."""
        self._created, self.siblings = turn.created, place_of(turn)
        self.pictures = turn.pictures
        self.forget()

    @property
    def text(self) -> str:
        return self._text

    def build(self, look: Look) -> list[Line]:
        shown = [line for one in self.pictures for line in picture_lines(one, look.frame.width, look.draw)]
        return [*self._band(look), *shown]

    def guess(self, look: Look) -> int:
        return super().guess(look) + sum(1 + size_in_cells(one)[1] for one in self.pictures)

    def _band(self, look: Look) -> list[Line]:
        facts = self._facts()
        room = look.frame.width - sum(cells(span.text) for span in facts) - 2
        if room < 16:
            lines = [Line(tuple(facts)), *self._laid(look.frame.width)]
            return _banded(self._folded(lines), look.frame.width)
        lines = self._folded(self._laid(room))
        used = sum(cells(span.text) for span in lines[0].spans)
        gap = Span(" " * (look.frame.width - used - sum(cells(span.text) for span in facts)), "", "")
        return _banded([Line((*lines[0].spans, gap, *facts)), *lines[1:]], look.frame.width)

    def _laid(self, width: int) -> list[Line]:
        if self.opened or not self._files:
            return lay([Span(self._text.expandtabs(4) or " ", "question")], width)
        lines = lay([Span(self._typed.expandtabs(4) or " ", "question")], width)
        return [*lines, *(Line((Span(cut(_chip(one), width), "button", "", "fold"),)) for one in self._files)]

    def _folded(self, lines: list[Line]) -> list[Line]:
        more = len(lines) - _FOLDED_LINES
        if self.opened or more < 4:
            return lines
        return [*lines[:_FOLDED_LINES], Line((Span(f"▸ {more} more lines", "button", "", "fold"),))]

    def _facts(self) -> list[Span]:
        place, count = self.siblings
        facts = []
        if count > 1:
            facts = [Span("‹ ", "button", "", "previous"), Span(f"{place}/{count}", "fact", "")]
            facts += [Span(" › ", "button", "", "next"), Span(" ", "fact", "")]
        moment = time.strftime("%H:%M", time.localtime(self._created))
        label = f"#{self.turn}" if self.turn else ""
        return [*facts, Span("  ".join(part for part in (label, moment) if part), "fact", "")]


def _chip(file: Attached) -> str:
    tokens = format_tokens(file.characters / CHARACTERS_PER_TOKEN)
    return f"▤ {file.name} · {file.lines:,} lines · about {tokens} tokens"


def _banded(lines: list[Line], width: int) -> list[Line]:
    """Return the lines on a band of `width` cells."""
    rests = (Span(" " * max(width - width_of(line.spans), 0), "", "") for line in lines)
    return [
        Line(tuple(styled((*line.spans, rest), "band")), line.joint)
        for line, rest in zip(lines, rests, strict=True)
    ]


class ModelChange(Block):
    """A rule before a question that another model answered than the one before it."""

    def __init__(self, turn: int, before: str, after: str) -> None:
        super().__init__(turn)
        names = [" ".join(printable(name).split()) for name in (before, after) if name]
        self._text = " → ".join(names)

    @property
    def text(self) -> str:
        return self._text

    @property
    def name(self) -> str:
        return "change of the model"

    def build(self, look: Look) -> list[Line]:
        return [Line((Span(cut(f"── {self._text} ──", look.frame.width), "rule"),))]


def place_of(turn: Turn) -> tuple[int, int]:
    """Return the place of a turn's reply among its siblings, from 1, and their number."""
    siblings = turn.siblings
    place = siblings.index(turn.node) + 1 if turn.node in siblings else 1
    return place, max(1, len(siblings))


class Thought(Block):
    """A thought: a line with time and tokens, while it runs its last lines too, and all lines when opened."""

    foldable = True
    depends_on_display = True

    def __init__(self, turn: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(turn)
        self.tokens, self.seconds = 0, 0.0
        self.running = False
        self._clock, self._began = clock, 0.0
        self._text, self._cleaner = "", Cleaner()
        self._plain: _Plain | None = None

    @classmethod
    def of(cls, turn: Turn) -> "Thought":
        """Return a finished turn's thought."""
        thought = cls(turn.number)
        thought._text = printable(turn.thinking).strip()
        thought.end(turn)
        return thought

    @property
    def text(self) -> str:
        return self._text.strip()

    def feed(self, text: str, tokens: int) -> None:
        if not self.running:
            self.running, self._began = True, self._clock()
        self.tokens += tokens
        self._text = (self._text + self._cleaner.feed(text)).lstrip()

    def end(self, turn: Turn | None = None) -> None:
        """Complete the thought; the figures of `turn` replace the measured ones."""
        if self.running:
            self.running, self.seconds = False, self._clock() - self._began
            self._text += self._cleaner.flush()
        if turn is not None:
            self.seconds = turn.seconds_thinking or self.seconds
            self.tokens = turn.stats.reasoning_tokens or self.tokens
        self._plain = None
        self.forget()

    def is_open(self, _look: Look) -> bool:
        return _look.thoughts == "open" if self.opened is None else self.opened

    def flush(self) -> None:
        if isinstance(self._key, Look):
            self._lines = self.build(self._key)
            self.strips.clear()

    def guess(self, look: Look) -> int:
        return super().guess(look) if self.is_open(look) else 2

    def build(self, look: Look) -> list[Line]:
        if not self._text:
            return []
        if self.is_open(look):
            return [self._head("▾", "to fold", look), *self._all(look)]
        if self.running and look.thoughts == "live":
            return [self._head("▾", "", look), *self._last(look)]
        return [self._head("▸", "to read", look)]

    def _head(self, mark: str, hint: str, look: Look) -> Line:
        seconds = self._clock() - self._began if self.running else self.seconds
        verb = "thinking" if self.running else "thought"
        left = f"{mark} {verb} {_duration(seconds)} · {self.tokens:,} tokens"
        right = f"ctrl+o {hint}" if hint else ""
        gap = look.frame.width - cells(left) - cells(right)
        if gap < 4 or not right:
            return Line((Span(cut(left, look.frame.width), "thought.head", "", "fold"),))
        hint_span = Span(" " * gap + right, "fact", "", "fold")
        return Line((Span(left, "thought.head", "", "fold"), hint_span))

    def _last(self, look: Look) -> list[Line]:
        tail = self._text[-4 * look.frame.width :].split("\n")
        lines = [line for part in tail if part.strip() for line in _thought_lines(part, look.frame.width)]
        return lines[-_LIVE_LINES:]

    def _all(self, look: Look) -> list[Line]:
        if self._plain is None or self._plain.width != look.frame.width:
            self._plain = _Plain(look.frame.width)
        return self._plain.lines(self._text)

    def forget(self) -> None:
        super().forget()
        self._plain = None


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes} min {seconds - 60 * minutes:.0f} s" if minutes else f"{seconds:.1f} s"


def _thought_lines(text: str, width: int) -> list[Line]:
    return lay([Span(text.expandtabs(4), "thought")], width)


class _Plain:
    """Lays out a text that only grows, each line once."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._done: list[Line] = []
        self._upto = 0

    def lines(self, text: str) -> list[Line]:
        ended = text.rfind("\n") + 1
        if ended > self._upto:
            for line in text[self._upto : ended - 1].split("\n"):
                self._done += _thought_lines(line, self.width)
            self._upto = ended
        rest = text[self._upto :]
        return [*self._done, *_thought_lines(rest, self.width)] if rest else self._done


class Answer(Block):
    """An answer, as Markdown; while it is running, laid out as it comes."""

    def __init__(self, turn: int = 0, text: str = "", *, running: bool = False) -> None:
        super().__init__(turn)
        self._text = printable(text).rstrip()
        self.running = running
        self._fresh, self._cleaner = "", Cleaner()
        self._stream: Stream | None = None

    @property
    def text(self) -> str:
        return self._text

    def feed(self, text: str) -> None:
        text = self._cleaner.feed(text)
        self._fresh += text if self._text or self._fresh else text.lstrip()

    def flush(self) -> None:
        fresh, self._fresh = self._fresh, ""
        self._text += fresh
        if self._stream is not None and fresh:
            self._changed(self._stream.feed(fresh))

    def end(self) -> None:
        """Complete the answer; nothing more will be fed."""
        self._fresh += self._cleaner.flush()
        self.flush()
        self.running, self._text = False, self._text.rstrip()
        if self._stream is not None:
            self._changed(self._stream.finish())
            self._lines = _with_hint(self._stream.lines, self._stream.frame)
            self._stream = None

    def _changed(self, first: int) -> None:
        for row in [row for row in self.strips if row >= first]:
            del self.strips[row]

    def build(self, look: Look) -> list[Line]:
        if not self.running:
            return _with_hint(document(self._text, look.frame), look.frame)
        self._stream = Stream(look.frame)
        self._stream.feed(self._text)
        return self._stream.lines

    def forget(self) -> None:
        super().forget()
        self._stream = None

    def codes(self) -> list[Code]:
        return code_blocks(self._text)

    @property
    def markdown(self) -> str:
        return self._text


def _with_hint(lines: list[Line], frame: Frame) -> list[Line]:
    """Add a line that says how to see tables whose columns had no room."""
    if all(not line.spans or line.spans[0].action != FOLDED for line in lines):
        return lines
    return [*lines, Line((Span(cut(_FOLDED_TABLES, frame.width), "button", "", TABLE),))]


class Note(Block):
    """A sentence of qchat between the turns."""

    is_extra = True

    def __init__(self, text: str, kind: NoteKind = "info", turn: int = 0) -> None:
        super().__init__(turn)
        self._text, self._kind = printable(text).strip(), kind

    @property
    def text(self) -> str:
        return self._text

    @property
    def name(self) -> str:
        return "note"

    def build(self, look: Look) -> list[Line]:
        body = lay([Span(self._text.expandtabs(4), self._kind)], look.frame.width - 2)
        marks = [Span(f"{_MARKS.get(self._kind, '·')} ", self._kind, ""), Span("  ", "", "")]
        return [Line((marks[row > 0], *line.spans), line.joint) for row, line in enumerate(body)]


class Ending(Note):
    """A line that says why a reply stopped before its end."""

    is_extra = False

    @classmethod
    def of(cls, turn: int, reason: str, detail: str = "", *, said: bool = True) -> "Ending | None":
        """Return the line for a finish reason; None after a usual end, unless nothing was `said`."""
        reason = "empty" if reason == "stop" and not said else reason
        if reason not in _ENDINGS:
            return None
        text = f"{_ENDINGS[reason]}: {detail}" if detail else _ENDINGS[reason]
        return cls(text, "error" if reason == "error" else "info", turn)

    def build(self, look: Look) -> list[Line]:
        return lay([Span(self._text, self._kind)], look.frame.width)
