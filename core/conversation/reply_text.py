"""The text of one reply as its ids are drawn: thought, answer and tool calls, as events.

Holds back what may become a stop string or a tool call. A call that the end of the reply cuts off stays text.
A limit on the calls ends the reply as a stop string does.
Whole calls at the end of a thought count where no answer follows: models forget to end the thought.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..calls.toolcalls import Piece, ToolCallParser
from ..events import Text, Thought, ToolUse
from ..generation.endings import StopStrings
from ..text.reply_parser import Kind, PlainParser, ReplyParser
from ..text.tokenizer import Tokenizer

TextEvent = Thought | Text | ToolUse


class ReplyText:
    """`text` is the answer so far, `thought` the reasoning, `calls` the tool calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool,
        stops: Sequence[str],
        tools: Sequence[dict[str, Any]],
        include_reasoning: bool,
        is_plain: bool = False,
        one_call: bool = False,
        distinct_calls: bool = False,
    ):
        """`thinking` means that the prompt leaves a thought open, `is_plain` that thoughts are text too.

        With `one_call` the reply ends with its first call, with `distinct_calls` before it repeats one.
        """
        self._tokenizer = tokenizer
        self._parser = PlainParser(tokenizer) if is_plain else ReplyParser(tokenizer, inside=thinking)
        self._stops = StopStrings(stops)
        self._tools = tools
        self._call_parser = ToolCallParser(tools) if tools else None
        self._include_reasoning = include_reasoning
        self._one_call, self._distinct_calls = one_call, distinct_calls
        self._called_enough = False
        self._last_call = 0  # ids up to the end of the last call
        self._unreported = 0
        self._answer_text = ""  # with what stop strings hold back or end
        self._answer_lengths: list[int] = []  # of it, after each id
        self.text = self.thought = ""
        self.calls: list[ToolUse] = []

    @property
    def thinking(self) -> bool:
        """Whether a thought is open."""
        return self._parser.inside

    @property
    def reasoning_tokens(self) -> int:
        return self._parser.reasoning_tokens

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, or no further call may follow."""
        return self._stops.found or self._called_enough

    @property
    def stop_string(self) -> str:
        """The stop string that was found; empty without one."""
        return self._stops.matched

    @property
    def has_unread_call(self) -> bool:
        """Whether the answer holds what began as a call, and could not be read."""
        return self._call_parser is not None and self._call_parser.unread > 0

    @property
    def provisional(self) -> str:
        """The answer so far, with text that may still become a call."""
        return self.text + (self._call_parser.held if self._call_parser else "")

    def add(self, token: int) -> Iterator[TextEvent]:
        """Yield the events that an id completes."""
        self._unreported += 1
        pieces = self._parser.add(token)
        self._answer_text += "".join(text for kind, text in pieces if kind == "text")
        self._answer_lengths.append(len(self._answer_text))
        yield from self._split(pieces)

    def shown_ids(self, ids: Sequence[int]) -> list[int]:
        """Return the reply's `ids` without what ended it: a stop string or a repeated call, and all after it.

        Words that share an id with the stop string are encoded anew.
        """
        if not self.stopped:
            return list(ids)
        if self._called_enough:
            return list(ids[: self._last_call])
        end = self._stops.passed
        kept = list(ids[: bisect_right(self._answer_lengths, end)])
        while kept and self._tokenizer.decode(kept).endswith("\ufffd"):  # the beginning of a character
            kept.pop()
        known = self._answer_lengths[len(kept) - 1] if kept else 0
        return [*kept, *self._tokenizer.encode(self._answer_text[known:end], special=False)]

    def flush(self, *, cut: bool) -> Iterator[TextEvent]:
        """Yield what was held back until the reply's end; `cut` means that the model did not end it."""
        yield from self._split(self._parser.flush())
        yield from self._answer(self._stops.flush())
        if self._call_parser:
            yield from self._report(self._call_parser.flush(cut=cut))
        if self._tools and not (cut or self.calls or self.text.strip()):
            yield from self._report(self._calls_in_thought())

    def _calls_in_thought(self) -> list[ToolUse]:
        """Return the whole calls that end the thought."""
        parser, found = ToolCallParser(self._tools), list[ToolUse]()
        for piece in [*parser.add(self.thought), *parser.flush(cut=True)]:
            if isinstance(piece, ToolUse):
                found.append(piece)
            elif piece.strip():
                found.clear()
        names = {tool.get("function", tool)["name"] for tool in self._tools}
        return found if names.issuperset(call.name for call in found) else []

    def _split(self, pieces: Iterable[tuple[Kind, str]]) -> Iterator[TextEvent]:
        for kind, text in pieces:
            if kind == "text":
                yield from self._answer(self._stops.add(text))
                continue
            self.thought += text
            thought = Thought(text, self._claim_tokens())
            if self._include_reasoning:
                yield thought

    def _answer(self, text: str) -> Iterator[TextEvent]:
        if text:
            yield from self._report(self._call_parser.add(text) if self._call_parser else [text])

    def _report(self, pieces: Iterable[Piece]) -> list[Text | ToolUse]:
        """Return the events of all pieces: the state must not depend on when they are consumed."""
        events: list[Text | ToolUse] = []
        for piece in pieces:
            if isinstance(piece, ToolUse):
                self._called_enough = self._called_enough or self._repeats(piece)
            if self._called_enough:
                break
            if isinstance(piece, ToolUse):
                self.calls.append(replace(piece, tokens=self._claim_tokens()))
                self._last_call, self._called_enough = len(self._answer_lengths), self._one_call
                events.append(self.calls[-1])
            else:
                self.text += piece
                events.append(Text(piece, self._claim_tokens()))
        return events

    def _repeats(self, call: ToolUse) -> bool:
        """Whether a small model that must call has begun to repeat itself."""
        said = [(past.name, past.arguments) for past in self.calls]
        return self._distinct_calls and (call.name, call.arguments) in said

    def _claim_tokens(self) -> int:
        """Return how many ids were drawn since the previous event."""
        tokens, self._unreported = self._unreported, 0
        return tokens
