"""One reply on its way: prompt, prefill, decode, the split of thought and answer, what ends it, `Done`.

Owns nothing that outlives the reply but what it writes into its `Output` and its session's live state.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .backend import mx
from .chat import Kind, ReplyParser, leaves_thought_open
from .engine import Engine
from .errors import ContextLengthExceeded, TemplateError
from .events import Done, Event, FinishReason, Notice, Performance, Prefill, Text, Thought
from .generate import Decoder, StopStrings, ThinkingBudget
from .loops import LoopDetector
from .sampling import Sampling, resolve
from .settings import ReplySettings
from .snapshots import Kind as SnapshotKind
from .transcript import Input, Output, branch

if TYPE_CHECKING:
    from .session import Session

LOOP_IN_ANSWER = "the answer had begun to repeat itself without end and was stopped"
LOOP_IN_THOUGHT = "the thought had begun to repeat itself without end and was closed"


class PendingReply:
    """A reply to `node`, not yet begun; nothing is computed before `run`."""

    def __init__(self, session: "Session", node: Input, opener: list[int], given: dict[str, Any]):
        engine = session.engine
        self.session, self.node, self.settings = session, node, ReplySettings.parse(given)
        self.came_after = session.leaf
        self.output = Output(node, opener)
        self.asked = session.author.ids(branch(node), session.history)
        self.prompt = [*self.asked, *opener]
        if not self.prompt:
            raise TemplateError(f"{engine.template.origin} makes an empty prompt of this conversation")
        limit = session.context_limit
        if len(self.prompt) >= limit:
            raise ContextLengthExceeded(len(self.prompt), limit)
        self.room = min(self.settings.max_new_tokens, limit - len(self.prompt))
        thinking = leaves_thought_open(self.prompt, engine.tokenizer)
        self.sampling: Sampling = resolve(sampling_of(given), engine.generation_config, thinking)
        self.parser = ReplyParser(engine.tokenizer, inside=thinking)
        self.stops = StopStrings(self.settings.stop)
        self.text = self.thought = self.detail = ""
        self.reason: FinishReason = "length"
        self.cached = self.unshown = 0
        self.clock = Clock()

    def run(self) -> Iterator[Event]:
        """Yield the reply's events. An error of the machine ends it with a `Done` that explains."""
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
        yield from self._pieces(self.parser.flush())
        if tail := self.stops.flush():
            yield self._answer(tail)
        yield self._done()

    def _read_prompt(self) -> Iterator[Event]:
        session, total = self.session, len(self.prompt)
        sync = session.sync(self.prompt)
        self.cached = sync.cached
        yield sync
        yield Prefill(self.cached, total, self.cached)
        marks: tuple[tuple[SnapshotKind, int], ...] = (("A", len(self.asked)), ("prompt", total))
        for kind, end in marks:
            for done in session.read(self.prompt[:end]):
                yield Prefill(done, total, self.cached)
            if len(session.ids) == end:
                session.keep(kind)
        if disagreement := session.disagreement(self.node):
            yield Notice(f"the kept tokens differ from the template's rendering: {disagreement}")

    def _decode(self) -> Iterator[Event]:
        session, engine = self.session, self.session.engine
        budget = ThinkingBudget(self.settings.thinking_token_budget, engine.tokenizer.think_close_id)
        decoder = Decoder(engine.model, session.cache, self.sampling)
        loops, ids = LoopDetector(), self.output.ids
        while len(ids) < self.room:
            if session.cancelled:
                self.reason = "cancelled"
                return
            if self.parser.inside:
                budget.close(self.parser.reasoning_tokens, decoder)
            token = decoder.next()
            self.clock.token(len(self.prompt) - self.cached)
            session.ids.append(token)
            ids.append(token)
            if token in engine.tokenizer.stop_ids:
                self.reason = "stop"
                return
            self.unshown += 1
            yield from self._pieces(self.parser.add(token))
            if self.stops.found:
                self.reason = "stop"
                return
            if loops.add(token):
                if not self._close_thought(decoder):
                    self.reason, self.detail = "stop", LOOP_IN_ANSWER
                    return
                loops = LoopDetector()

    def _close_thought(self, decoder: Decoder) -> bool:
        close = self.session.engine.tokenizer.think_close_id
        if not self.parser.inside or close is None:
            return False
        decoder.force(close)
        self.detail = LOOP_IN_THOUGHT
        return True

    def _pieces(self, pieces: list[tuple[Kind, str]]) -> Iterator[Event]:
        for kind, text in pieces:
            if kind == "thought":
                self.thought += text
                thought = Thought(text, self._claim())
                if self.settings.include_reasoning:
                    yield thought
            elif shown := self.stops.add(text):
                yield self._answer(shown)

    def _answer(self, text: str) -> Text:
        self.text += text
        return Text(text, self._claim())

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
            prefilled_tokens=len(self.prompt) - self.cached,
            reasoning_tokens=self.parser.reasoning_tokens,
            generated_tokens=len(self.output.ids),
            thinking_cut=self.parser.inside,
            detail=self.detail,
        )
        return (
            replace(done, performance=self.clock.performance()) if self.settings.report_performance else done
        )

    def settle(self) -> None:
        """Write what was said into the transcript, also when the reply was left half way."""
        message = {"role": "assistant", "content": self.text}
        self.output.message = message | ({"reasoning_content": self.thought} if self.thought else {})


class Clock:
    """Times of one reply: when it began, its first and its last token."""

    def __init__(self):
        mx.reset_peak_memory()
        self.begin = self.first = self.last = time.perf_counter()
        self.count = self.prefilled = 0

    def token(self, prefilled: int) -> None:
        self.last = time.perf_counter()
        if not self.count:
            self.first, self.prefilled = self.last, prefilled
        self.count += 1

    def performance(self) -> Performance:
        reading, writing = self.first - self.begin, self.last - self.first
        return Performance(
            seconds_to_first_token=reading,
            prefill_tokens_per_s=self.prefilled / reading if reading else 0.0,
            decode_tokens_per_s=(self.count - 1) / writing if writing else 0.0,
            seconds=time.perf_counter() - self.begin,
            active_nbytes=mx.get_active_memory(),
            peak_nbytes=mx.get_peak_memory(),
            cache_nbytes=mx.get_cache_memory(),
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
