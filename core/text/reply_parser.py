"""The streaming split of a reply into thought and answer.

Owns the trimming of newlines around thoughts. Splits by token id, never by text: an answer may quote
`</think>`.
"""

from collections.abc import Sequence
from typing import Literal

from .tokenizer import Tokenizer

Kind = Literal["thought", "text"]


class ThinkSplitter:
    """Tells thought from answer, one id at a time; `inside` says whether the next id is in a thought.

    The prompt may have opened the first thought. A later opener starts another one. An opener inside a
    thought and a closer outside one are ordinary text.
    """

    def __init__(self, open_id: int | None, close_id: int | None, inside: bool):
        self._open_id = open_id
        self._close_id = close_id
        self.inside = inside

    def add(self, id: int) -> Kind | None:
        """The kind of text that `id` is part of; None for a delimiter."""
        if id == (self._close_id if self.inside else self._open_id):
            self.inside = not self.inside
            return None
        return "thought" if self.inside else "text"


def leaves_thought_open(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends inside a thought. Some templates open it, others leave that to the model."""
    opens = {tokenizer.think_open_id: True, tokenizer.think_close_id: False}
    return next((opens[id] for id in reversed(ids) if id in opens), False)


class PlainParser:
    """The parser of a text that is no reply: everything is text, delimiters of thoughts included."""

    inside = False
    reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer):
        self._detokenizer = tokenizer.detokenizer()

    def add(self, id: int) -> list[tuple[Kind, str]]:
        """The text that `id` completes, as at most one non-empty piece."""
        text = self._detokenizer.add(id)
        return [("text", text)] if text else []

    def flush(self) -> list[tuple[Kind, str]]:
        """The text of an unfinished character at the end."""
        text = self._detokenizer.flush()
        return [("text", text)] if text else []


class ReplyParser:
    """Turns the ids of one reply into pieces of text with their kind, without the delimiters.

    Drops newlines before the answer and at both ends of each thought, and puts a blank line between two
    thoughts. `reasoning_tokens` counts the ids inside thoughts, delimiters excluded.
    """

    def __init__(self, tokenizer: Tokenizer, inside: bool):
        self._splitter = ThinkSplitter(tokenizer.think_open_id, tokenizer.think_close_id, inside)
        self._detokenizer = tokenizer.detokenizer()
        self._begun: set[Kind] = set()  # kinds that have produced text
        self._at_start = True
        self._held = ""  # newlines of a thought that may turn out to be its last
        self.reasoning_tokens = 0

    @property
    def inside(self) -> bool:
        """Whether the next id belongs to a thought."""
        return self._splitter.inside

    def add(self, id: int) -> list[tuple[Kind, str]]:
        """The text that `id` completes, as at most one non-empty piece."""
        before: Kind = "thought" if self.inside else "text"
        kind = self._splitter.add(id)
        if kind is None:
            pieces = self._piece(before, self._detokenizer.flush())
            self._open_block()
            return pieces
        self.reasoning_tokens += kind == "thought"
        return self._piece(kind, self._detokenizer.add(id))

    def flush(self) -> list[tuple[Kind, str]]:
        """The text of an unfinished character at the end of the reply."""
        return self._piece("thought" if self.inside else "text", self._detokenizer.flush())

    def _open_block(self) -> None:
        self._at_start = self.inside or "text" not in self._begun
        self._held = "\n\n" if self.inside and "thought" in self._begun else ""

    def _piece(self, kind: Kind, text: str) -> list[tuple[Kind, str]]:
        if self._at_start:
            text = text.lstrip("\n")
        if not text:
            return []
        self._at_start = False
        if kind == "thought":
            text = self._held + text
            kept = text.rstrip("\n")
            text, self._held = kept, text[len(kept) :]
        self._begun |= {kind} if text else set()
        return [(kind, text)] if text else []
