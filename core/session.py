"""One conversation with one engine: messages in, events out; the cache is kept from turn to turn.

A reply runs in eight steps: settings, prompt, what of it the cache holds, prefill, decode, split of thought
and answer, what ends it, `Done`. One reply at a time; a prompt that does not fit is refused before anything
is computed.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .backend import mx
from .chat import Kind, ReplyParser, leaves_thought_open
from .engine import Engine
from .errors import ContextLengthExceeded, TemplateError, UsageError
from .events import Done, Event, FinishReason, Notice, Performance, Prefill, Text, Thought
from .generate import Decoder, StopStrings, ThinkingBudget, prefill
from .loops import LoopDetector
from .sampling import Sampling, resolve
from .settings import ReplySettings
from .tokenizer import Tokenizer

__all__ = ["Engine", "Reply", "Session", "load_session"]

LOOP_IN_ANSWER = "the answer had begun to repeat itself without end and was stopped"
LOOP_IN_THOUGHT = "the thought had begun to repeat itself without end and was closed"


@dataclass(frozen=True)
class Reply(Done):
    """A finished reply: the fields of `Done` under the name that `Session.send` returns."""


def load_session(path: str | Path, system: str | None = None, **defaults: Any) -> "Session":
    """Load a model folder and begin a conversation; `defaults` are settings for every reply.

    Raises ModelError for the folder, UsageError for a setting.
    """
    check_settings(defaults)
    return Session(Engine.load(path), system, **defaults)


def check_settings(given: dict[str, Any]) -> None:
    """Raises UsageError for a name or a value that no reply could have."""
    ReplySettings.parse(given)
    resolve(_sampling(given), {}, thinking=True)


class Session:
    """A conversation; `messages` is its transcript in the template's form."""

    def __init__(self, engine: Engine, system: str | None = None, **defaults: Any):
        check_settings(defaults)
        self.engine = engine
        self.defaults = defaults
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.ids: list[int] = []
        self._cache = engine.model.new_cache()
        self._notices = list(engine.notices)
        self._cancelled = False
        self._busy = False

    def cancel(self) -> None:
        """Stop the reply asked for last at its next token or chunk; safe from signal handlers and threads."""
        self._cancelled = True

    def send(self, text: str, **settings: Any) -> Reply:
        """Say `text` and wait for the whole reply. Raises as `stream` does."""
        *_, done = self.stream(text, **settings)
        if not isinstance(done, Done):
            raise TypeError("a reply ended without Done")
        return Reply(**{name: getattr(done, name) for name in Done.__dataclass_fields__})

    def stream(self, text: str, **settings: Any) -> Generator[Event]:
        """Say `text`; yields events and exactly one `Done`, the last.

        `settings` stand over the session's defaults. Raises UsageError for a setting or a second reply at
        once, TemplateError for messages the template refuses, and ContextLengthExceeded, all of them before
        anything is computed.
        """
        self._refuse_if_busy()
        self._cancelled = False  # here, so that a cancel between asking and the first event counts
        given = self.defaults | settings
        return self._run(_Reply(self, text, ReplySettings.parse(given), given))

    def _refuse_if_busy(self) -> None:
        if self._busy:
            raise UsageError("this session is answering already: wait for the reply or cancel it")

    def _run(self, reply: "_Reply") -> Generator[Event]:
        self._refuse_if_busy()
        if reply.history is not self.messages:
            raise UsageError("the conversation went on after this reply was asked for: ask again")
        self._busy = True
        try:
            while self._notices:
                yield Notice(self._notices.pop(0))
            yield from reply.run()
        finally:
            reply.settle()
            self._busy = False

    def _sync(self, ids: list[int]) -> int:
        """Make the cache hold a prefix of `ids`, all but the last at most; returns its length."""
        if not (len(self.ids) < len(ids) and ids[: len(self.ids)] == self.ids):
            self._forget()
        return len(self.ids)

    def _forget(self) -> None:
        self._cache, self.ids = self.engine.model.new_cache(), []


class _Reply:
    """One reply on its way: what it was asked for, what came of it so far."""

    def __init__(self, session: Session, text: str, settings: ReplySettings, given: dict[str, Any]):
        engine = session.engine
        self.session, self.settings = session, settings
        self.history = session.messages
        self.messages = [*self.history, {"role": "user", "content": text}]
        thinking, extra = _thinking(engine, settings)
        prompt = engine.template.render(
            [_shielded(message, engine.tokenizer) for message in self.messages],
            add_generation_prompt=True,
            enable_thinking=thinking,
            **extra,
        )
        self.prompt = engine.tokenizer.encode(prompt)
        if not self.prompt:
            raise TemplateError(f"{engine.template.origin} makes an empty prompt of this conversation")
        limit = engine.config.max_position_embeddings
        if len(self.prompt) >= limit:
            raise ContextLengthExceeded(len(self.prompt), limit)
        self.room = min(settings.max_new_tokens, limit - len(self.prompt))
        self.sampling: Sampling = resolve(_sampling(given), engine.generation_config, thinking)
        self.parser = ReplyParser(engine.tokenizer, inside=leaves_thought_open(self.prompt, engine.tokenizer))
        self.stops = StopStrings(settings.stop)
        self.generated: list[int] = []
        self.text = self.thought = self.detail = ""
        self.reason: FinishReason = "length"
        self.cached = self.unshown = 0
        self.clock = _Clock()

    def run(self) -> Iterator[Event]:
        """Yield the reply's events. An error of the machine ends it with a `Done` that explains."""
        try:
            yield from self._read_prompt()
            if self.session._cancelled:
                self.reason = "cancelled"
            else:
                yield from self._decode()
        except (RuntimeError, MemoryError) as error:  # what MLX raises when memory or a kernel fails
            self.reason, self.detail = "error", f"the computation failed: {' '.join(str(error).split())}"
            self.session._forget()
        except GeneratorExit:  # between two events the cache and its ids agree
            raise
        except BaseException:  # an interrupt within a step, where they do not
            self.session._forget()
            raise
        yield from self._pieces(self.parser.flush())
        if tail := self.stops.flush():
            yield self._answer(tail)
        yield self._done()

    def _read_prompt(self) -> Iterator[Event]:
        session = self.session
        self.cached = session._sync(self.prompt)
        total = len(self.prompt)
        yield Prefill(self.cached, total, self.cached)
        rest = self.prompt[self.cached :]
        for done in prefill(session.engine.model, session._cache, rest, lambda: session._cancelled):
            session.ids = self.prompt[: self.cached + done]
            yield Prefill(self.cached + done, total, self.cached)

    def _decode(self) -> Iterator[Event]:
        session, engine = self.session, self.session.engine
        budget = ThinkingBudget(self.settings.thinking_token_budget, engine.tokenizer.think_close_id)
        decoder = Decoder(engine.model, session._cache, self.prompt[-1], self.sampling)
        session.ids = list(self.prompt)
        loops = LoopDetector()
        while len(self.generated) < self.room:
            if session._cancelled:
                self.reason = "cancelled"
                return
            if self.parser.inside:
                budget.close(self.parser.reasoning_tokens, decoder)
            token = decoder.next()
            self.clock.token(len(self.prompt) - self.cached)
            session.ids.append(token)
            self.generated.append(token)
            if token in engine.tokenizer.stop_ids:
                self.reason = "stop"
                return
            self.unshown += 1
            yield from self._pieces(self.parser.add(token))
            if self.stops.found:
                self.reason = "stop"
                return
            if loops.add(token) and self._close_loop(decoder):
                loops = LoopDetector()
            elif self.reason == "stop":
                return

    def _close_loop(self, decoder: Decoder) -> bool:
        """End a repeating thought by closing it (True), a repeating answer by stopping."""
        close = self.session.engine.tokenizer.think_close_id
        if self.parser.inside and close is not None:
            decoder.force(close)
            self.detail = LOOP_IN_THOUGHT
            return True
        self.reason, self.detail = "stop", LOOP_IN_ANSWER
        return False

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
        tokenizer = self.session.engine.tokenizer
        done = Done(
            finish_reason=self.reason,
            text=self.text,
            thinking=self.thought if self.settings.include_reasoning else "",
            raw_text=tokenizer.decode(self.generated),
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            prefilled_tokens=len(self.prompt) - self.cached,
            reasoning_tokens=self.parser.reasoning_tokens,
            generated_tokens=len(self.generated),
            thinking_cut=self.parser.inside,
            detail=self.detail,
        )
        return (
            replace(done, performance=self.clock.performance()) if self.settings.report_performance else done
        )

    def settle(self) -> None:
        """Write what was said into the transcript, also when the reply was left half way."""
        if self.generated:
            answer = {"role": "assistant", "content": self.text}
            if self.thought:
                answer["reasoning_content"] = self.thought
            self.session.messages = [*self.messages, answer]


class _Clock:
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


def _shielded(message: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """What looks like a special token in what somebody wrote is text, not a turn of its own."""
    texts = {name: message.get(name) for name in ("content", "reasoning_content")}
    return message | {name: tokenizer.shield(text) for name, text in texts.items() if text is not None}


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in Sampling.__dataclass_fields__}


def _thinking(engine: Engine, settings: ReplySettings) -> tuple[bool, dict[str, Any]]:
    """Whether to think, and the effort for a template that takes one by name."""
    effort, asked = settings.reasoning_effort, settings.enable_thinking
    if effort is None:
        return engine.thinks_by_default if asked is None else asked, {}
    if "reasoning_effort" in engine.template.source and effort != "none":
        word = "xhigh" if effort == "high" else effort
        return asked is not False, {"reasoning_effort": word}
    return (effort not in ("none", "low")) if asked is None else asked, {}
