"""One reply on its way: prompt, prefill, decode, the split of thought and answer, what ends it, `Done`.

Owns nothing that outlives the reply but what it writes into its `Output` and its session's live state.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..engine.engine import Engine
from ..errors import ContextLengthExceeded, TemplateError
from ..events import Done, Event, FinishReason, Notice, Performance, Prefill, Text, Thought, ToolUse
from ..generation.decode import AnyDecoder, drafts_for, make_decoder
from ..generation.endings import StopStrings, ThinkingBudget
from ..generation.loops import LoopDetector
from ..generation.reply_settings import ReplySettings
from ..generation.sampling import Sampling, resolve
from ..machine.backend import mx
from ..text.reply_parser import Kind, ReplyParser, leaves_thought_open
from ..text.toolcalls import Piece, ToolCallParser
from .snapshots import Kind as SnapshotKind
from .transcript import Input, Output, branch, message_of

if TYPE_CHECKING:
    from .session import Session

LOOP_IN_ANSWER = "the answer had begun to repeat itself without end and was stopped"
LOOP_IN_THOUGHT = "the thought had begun to repeat itself without end and was closed"
CLOSED_ON_REQUEST = "the thought was closed on request"


class PendingReply:
    """A reply to `node`, not yet begun; nothing is computed before `run`.

    It was asked for at `begun`, on the clock of `time.perf_counter`.
    """

    def __init__(
        self, session: "Session", node: Input, opener: list[int], given: dict[str, Any], begun: float
    ):
        engine = session.engine
        self.session, self.node, self.settings = session, node, ReplySettings.parse(given)
        self.switches = switches_of(engine, given)
        self.came_after = session.leaf
        self.output = Output(node, opener, settings=given)
        self.asked = session.author.ids(branch(node), session.history)
        self.prompt = [*self.asked, *opener]
        if not self.prompt:
            raise TemplateError(f"{engine.template.origin} makes an empty prompt of this conversation")
        limit = session.context_limit
        if len(self.prompt) >= limit:
            raise ContextLengthExceeded(len(self.prompt), limit)
        self.room = min(self.settings.max_new_tokens, limit - len(self.prompt))
        thinking = leaves_thought_open(opener, engine.tokenizer)
        self.sampling: Sampling = resolve(sampling_of(given), engine.generation_config, thinking)
        self.parser = ReplyParser(engine.tokenizer, inside=thinking)
        self.stops = StopStrings(self.settings.stop)
        self.calls = ToolCallParser(session.tools) if session.tools else None
        self.uses: list[ToolUse] = []
        self.text = self.thought = self.detail = ""
        self.reason: FinishReason = "length"
        self.ended = self.settled = self.synced = False
        self.cached = self.read = self.unshown = 0
        self.authoring_seconds = time.perf_counter() - begun
        self.clock = Clock()

    def run(self) -> Iterator[Event]:
        """Yield the reply's events. An error of the machine ends it with a `Done` that explains."""
        self.clock = Clock(self.authoring_seconds)
        if notice := self._unheard_effort():
            yield Notice(notice)
        try:
            yield from self._read_prompt()
            if self.session.cancelled:
                self.reason = "cancelled"
            else:
                yield from self._decode()
        except (RuntimeError, MemoryError) as error:  # what MLX raises when memory or a kernel fails
            self.reason, self.detail = "error", f"the computation failed: {' '.join(str(error).split())}"
            self.session.forget()
        except GeneratorExit:  # between two events the live state and its ids agree
            raise
        except BaseException:  # an interrupt within a step, where they do not
            self.session.forget()
            raise
        yield from self._rest()
        if self.read == len(self.prompt) and (notice := self.session.disagreement(self.node)):
            yield Notice(notice)
        yield self._done()

    def _unheard_effort(self) -> str | None:
        """A sentence for an effort that was changed where the template states it once and for all."""
        word = self.switches.get("reasoning_effort")
        first, before = branch(self.node)[0], self.came_after and self.came_after.parent
        stated = first.switches.get("reasoning_effort") if isinstance(first, Input) else None
        if word in (None, stated, before and before.switches.get("reasoning_effort")):
            return None
        return (
            f"this template states the effort before the first message, so a new conversation hears of {word}"
        )

    def _read_prompt(self) -> Iterator[Event]:
        session, total = self.session, len(self.prompt)
        session.drafts = drafts_for(session.engine.model, self.settings.draft_tokens)
        sync = session.sync(self.prompt)
        self.cached = self.read = sync.cached
        self.synced = True
        yield sync
        yield Prefill(self.cached, total, self.cached)
        marks: tuple[tuple[SnapshotKind, int], ...] = (("A", len(self.asked)), ("prompt", total))
        for kind, end in marks:
            for done in session.read(self.prompt[:end]):
                self.read = done
                yield Prefill(done, total, self.cached)
            if len(session.ids) == end:
                session.keep(kind, session.turn_of(self.node))

    def _decode(self) -> Iterator[Event]:
        session, engine = self.session, self.session.engine
        budget = ThinkingBudget(self.settings.thinking_token_budget, engine.tokenizer.think_close_id)
        decoder = make_decoder(engine.model, session.cache, self.sampling, session.drafts)
        try:
            yield from self._draw(decoder, budget)
        finally:
            decoder.finish()
            self.clock.drafted, self.clock.accepted = decoder.drafted, decoder.accepted

    def _draw(self, decoder: AnyDecoder, budget: ThinkingBudget) -> Iterator[Event]:
        session, engine = self.session, self.session.engine
        loops, ids = LoopDetector(), self.output.ids
        while len(ids) < self.room:
            if session.cancelled:
                self.reason = "cancelled"
                return
            if session.closing_thought:
                session.closing_thought = False
                self._close_thought(decoder, CLOSED_ON_REQUEST)
            elif self.parser.inside:
                budget.close(self.parser.reasoning_tokens, decoder)
            token = decoder.next()
            self.clock.token(inside=self.parser.inside)
            session.ids.append(token)
            ids.append(token)
            if token in engine.tokenizer.stop_ids:
                self.reason, self.ended = "stop", True
                return
            self.unshown += 1
            yield from self._pieces(self.parser.add(token))
            session.shelf.update(self.said, self.thought, ids)
            if self.stops.found:
                self.reason = "stop"
                return
            if loops.add(token):
                if not self._close_thought(decoder, LOOP_IN_THOUGHT):
                    self.reason, self.detail = "stop", LOOP_IN_ANSWER
                    return
                loops = LoopDetector()

    def _close_thought(self, decoder: AnyDecoder, why: str) -> bool:
        close = self.session.engine.tokenizer.think_close_id
        if not self.parser.inside or close is None:
            return False
        decoder.force(close)
        self.detail = why
        return True

    def _rest(self) -> Iterator[Event]:
        """What was held back until the reply's end. A call that it was cut inside stays text."""
        yield from self._pieces(self.parser.flush())
        yield from self._answer(self.stops.flush())
        if self.calls:
            yield from [self._shown(piece) for piece in self.calls.flush(cut=not self.ended)]

    def _pieces(self, pieces: list[tuple[Kind, str]]) -> Iterator[Event]:
        for kind, text in pieces:
            if kind == "thought":
                self.thought += text
                thought = Thought(text, self._claim())
                if self.settings.include_reasoning:
                    yield thought
            else:
                yield from self._answer(self.stops.add(text))

    def _answer(self, text: str) -> Iterator[Event]:
        if text:
            yield from [self._shown(piece) for piece in (self.calls.add(text) if self.calls else [text])]

    def _shown(self, piece: Piece) -> Text | ToolUse:
        if isinstance(piece, ToolUse):
            self.uses.append(replace(piece, tokens=self._claim()))
            return self.uses[-1]
        self.text += piece
        return Text(piece, self._claim())

    def _claim(self) -> int:
        """How many ids were drawn since the piece before."""
        tokens, self.unshown = self.unshown, 0
        return tokens

    def _done(self) -> Done:
        done = Done(
            finish_reason=self.reason,
            text=self.text,
            thinking=self.thought if self.settings.include_reasoning else "",
            raw_text=self.session.engine.tokenizer.decode(self.output.ids),
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            prefilled_tokens=self.read - self.cached,
            reasoning_tokens=self.parser.reasoning_tokens,
            generated_tokens=len(self.output.ids),
            thinking_cut=self.parser.inside,
            detail=self.detail,
            tool_calls=tuple(self.uses),
        )
        if not self.settings.report_performance:
            return done
        return replace(done, performance=self.clock.performance(self.read - self.cached))

    @property
    def said(self) -> str:
        """The answer so far, with what may still become a call."""
        return self.text + (self.calls.held if self.calls else "")

    def settle(self) -> None:
        """Write what was said into the transcript, also when the reply was left half way."""
        if self.settled:
            return
        self.settled = True
        for _ in self._rest():
            pass
        text = self.text.strip() if self.uses else self.text
        calls = [{"name": use.name, "arguments": use.arguments} for use in self.uses]
        self.output.message = message_of(text, self.thought, calls)


class Clock:
    """Times of one reply: when it was asked for, when reading began, its first and its last token."""

    def __init__(self, authoring_seconds: float = 0.0):
        mx.reset_peak_memory()
        self.reading = self.first = self.last = time.perf_counter()
        self.asked = self.reading - authoring_seconds
        self.count, self.thinking = 0, 0.0
        self.drafted = self.accepted = 0

    def token(self, *, inside: bool) -> None:
        """A token was drawn, `inside` a thought or not."""
        now = time.perf_counter()
        if not self.count:
            self.first = now
        elif inside:
            self.thinking += now - self.last
        self.last = now
        self.count += 1

    def performance(self, prefilled: int) -> Performance:
        reading, writing = self.first - self.reading, self.last - self.first
        return Performance(
            seconds_to_first_token=self.first - self.asked if self.count else 0.0,
            prefill_tokens_per_s=prefilled / reading if reading else 0.0,
            decode_tokens_per_s=(self.count - 1) / writing if writing else 0.0,
            seconds=time.perf_counter() - self.asked,
            seconds_thinking=self.thinking,
            active_nbytes=mx.get_active_memory(),
            peak_nbytes=mx.get_peak_memory(),
            cache_nbytes=mx.get_cache_memory(),
            drafts_accepted=self.accepted / self.drafted if self.drafted else None,
        )


def sampling_of(given: dict[str, Any]) -> dict[str, Any]:
    """The sampling values among a reply's settings."""
    return {name: value for name, value in given.items() if name in Sampling.__dataclass_fields__}


def switches_of(engine: Engine, given: dict[str, Any]) -> dict[str, Any]:
    """The chat template's switches for a reply's settings: whether to think, and how hard."""
    settings = ReplySettings.parse(given)
    effort, asked = settings.reasoning_effort, settings.enable_thinking
    if effort is None:
        return {"enable_thinking": engine.thinks_by_default if asked is None else asked}
    if "reasoning_effort" in engine.template.source and effort != "none":
        word = "xhigh" if effort == "high" else effort
        return {"enable_thinking": asked is not False, "reasoning_effort": word}
    return {"enable_thinking": (effort not in ("none", "low")) if asked is None else asked}
