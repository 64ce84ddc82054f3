"""One reply from prompt to `Done`: sync, prefill, decode, and what ends it.

Owns nothing that outlives the reply: it writes into its `Output` and advances the live state of its context.
Computes nothing before `run`. Knows neither the conversation's tree nor its store.
"""

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..calls.call_grammar import call_style
from ..engine.engine import Engine
from ..errors import ContextLengthExceeded, TemplateError
from ..events import Done, Event, FinishReason, Logprobs, Prefill, Sync
from ..generation.constraint import AnswerForm, Constraint
from ..generation.decode import AnyDecoder, draft_limit, make_decoder
from ..generation.endings import ThinkingBudget
from ..generation.logprobs import Ranking, describe_draw, rank_next
from ..generation.loops import LoopGuard
from ..generation.reply_settings import ReplySettings
from ..prompt_cache.live_state import LiveState
from ..prompt_cache.snapshots import SnapshotKind
from ..text.reply_parser import leaves_thought_open
from ..vision.placement import count_images
from .reply_clock import ReplyClock
from .reply_text import ReplyText
from .transcript import Output, assistant_message

LOOP_IN_ANSWER = "the answer had begun to repeat itself without end and was stopped"
LOOP_IN_THOUGHT = "the thought had begun to repeat itself without end and was closed"
CIRCLING_THOUGHT = "the thought kept returning to the same sentences and was closed"
CONTEXT_FULL = "the context of {:,} tokens is full: start a new conversation or shorten this one"
CLOSED_ON_REQUEST = "the thought was closed on request"
UNREAD_CALL = "a tool call in the answer could not be read and was left as text"


@dataclass(frozen=True)
class Reply(Done):
    """A finished reply: the fields of `Done`, under the name that `Session.send` returns."""


@dataclass(frozen=True)
class TurnCost:
    """The tokens that one reply read: the sync with the cache, and the counts of `Done`.

    `image_tokens` of the prompt are those of pictures.
    """

    number: int
    sync: Sync
    prompt_tokens: int
    prefilled_tokens: int
    image_tokens: int = 0


@dataclass
class Signals:
    """Requests from other threads, read once a token and once a prefill chunk."""

    cancelled: bool = False
    close_thought: bool = False
    reason: str = ""  # why it was cancelled, for the user; empty if that was the user


@dataclass(frozen=True)
class ReplyContext:
    """The parts of a conversation that one reply needs.

    `update` receives the answer, the thought and the ids so far, after every id. Snapshots are kept for
    `conversation`. `is_plain` means that all ids are text, as after a prompt that is no conversation.
    `forced_call` makes the answer a call of that tool, or of any if it is empty; it ends before it repeats
    one. The arguments of `strict_tools` satisfy their schemas. Without `parallel_calls` the reply ends with
    its first call.
    """

    engine: Engine
    live: LiveState
    signals: Signals
    tools: Sequence[dict[str, Any]]
    context_limit: int
    update: Callable[[str, str, Sequence[int]], None]
    conversation: Hashable
    is_plain: bool = False
    forced_call: str | None = None
    strict_tools: Collection[str] = ()
    parallel_calls: bool = True


class PendingReply:
    """A requested reply, which `run` computes."""

    def __init__(
        self,
        context: ReplyContext,
        output: Output,
        history_ids: list[int],
        settings: ReplySettings,
        *,
        turn: int,
        begun: float,
        after: Output | None = None,
    ):
        """Check that the prompt fits: `history_ids` up to the question, then the opener of `output`.

        `begun` is the time of the request on `time.perf_counter`, `after` the leaf of the conversation then.
        Raises TemplateError for an empty prompt, ContextLengthExceeded, UsageError for a schema that no
        answer could satisfy, ConfigError for invalid sampling defaults of the model.
        """
        engine, limit = context.engine, context.context_limit
        self._context, self.output, self._turn, self.after = context, output, turn, after
        self.settings = settings
        self._history_ids, self.prompt = history_ids, [*history_ids, *output.opener]
        if not self.prompt:
            raise TemplateError(f"{engine.template.origin} renders an empty prompt for this conversation")
        if len(self.prompt) >= limit:
            raise ContextLengthExceeded(len(self.prompt), limit)
        self._room = min(settings.max_new_tokens, limit - len(self.prompt))
        thinking = leaves_thought_open(output.opener, engine.tokenizer)
        self._constraint = _make_constraint(context, settings, thinking=thinking)
        self._draft_limit = 0 if self._constraint else draft_limit(engine.model, settings.draft_tokens)
        self._sampling = settings.resolve_sampling(engine.generation_config, thinking=thinking)
        self._text = ReplyText(
            engine.tokenizer,
            thinking=thinking,
            stops=settings.stop,
            tools=context.tools,
            include_reasoning=settings.include_reasoning,
            is_plain=context.is_plain,
            one_call=not context.parallel_calls,
            distinct_calls=context.forced_call is not None,
        )
        self._reason: FinishReason = "length"
        self._detail = ""
        self._ended = self._settled = False
        self._cached = self._read = 0
        self.synced = False
        self._encoding_seconds = time.perf_counter() - begun
        self._clock = ReplyClock()

    @property
    def prefilled_tokens(self) -> int:
        """How many prompt tokens have been read so far."""
        return self._read - self._cached

    def cost(self, sync: Sync) -> TurnCost:
        """Return what the reply's turn costs as soon as the prompt is synced: nothing has been read yet."""
        return TurnCost(self._turn, sync, len(self.prompt), 0, count_images(self.prompt))

    def run(self) -> Iterator[Event]:
        """Yield the reply's events. A failed computation ends it with a `Done` that gives the error."""
        self._clock = ReplyClock(self._encoding_seconds)
        live = self._context.live
        try:
            yield from self._read_prompt()
            if self._context.signals.cancelled:
                self._reason, self._detail = "cancelled", self._context.signals.reason
            else:
                yield from self._decode()
        except (RuntimeError, MemoryError) as error:  # what MLX raises when memory or a kernel fails
            self._reason, self._detail = "error", f"the computation failed: {' '.join(str(error).split())}"
            live.forget()
        except GeneratorExit:  # between two events the live state and its ids agree
            raise
        except BaseException:  # an interrupt within a step, where they do not
            live.forget()
            raise
        yield from self._text.flush(cut=not self._ended)
        yield self._done()

    def _read_prompt(self) -> Iterator[Event]:
        live, signals, total = self._context.live, self._context.signals, len(self.prompt)
        conversation = self._context.conversation
        live.drafts = self._draft_limit > 0
        sync = live.sync(self.prompt)
        self._cached = self._read = sync.cached
        self.synced = True
        yield sync
        yield Prefill(self._cached, total, self._cached)
        marks: tuple[tuple[SnapshotKind, int], ...] = (("A", len(self._history_ids)), ("prompt", total))
        for kind, end in marks:
            for done in live.read(self.prompt[:end], lambda: signals.cancelled, conversation, self._turn):
                self._read = done
                yield Prefill(done, total, self._cached)
            if len(live.ids) == end > 0:
                live.keep_snapshot(kind, self._turn, conversation)

    def _decode(self) -> Iterator[Event]:
        engine = self._context.engine
        budget = ThinkingBudget(self.settings.thinking_token_budget, engine.tokenizer.think_close_id)
        live = self._context.live
        if self._draft_limit:
            live.draft_memory.copies.follow(live.text_ids)
        decoder = make_decoder(
            engine.model,
            live.cache,
            self._sampling,
            self._draft_limit,
            live.draft_memory,
            constraint=self._constraint,
        )
        try:
            yield from self._draw(decoder, budget)
        finally:
            decoder.finish()
            self._clock.drafts = decoder.figures

    def _draw(self, decoder: AnyDecoder, budget: ThinkingBudget) -> Iterator[Event]:
        context, text, ids = self._context, self._text, self.output.ids
        guard, top = LoopGuard(enabled=self.settings.stop_loops), self.settings.top_logprobs
        while len(ids) < self._room:
            if context.signals.cancelled:
                self._reason, self._detail = "cancelled", context.signals.reason
                return
            if context.signals.close_thought:
                context.signals.close_thought = False
                self._close_thought(decoder, CLOSED_ON_REQUEST)
            elif text.thinking and budget.enforce(text.reasoning_tokens, decoder) and guard.circling:
                self._detail = CIRCLING_THOUGHT
            ranking = None if top is None else rank_next(decoder, top)
            token = decoder.next()
            self._clock.count_token(thinking=text.thinking)
            context.live.ids.append(token)
            ids.append(token)
            if token in context.engine.tokenizer.stop_ids:
                self._reason, self._ended = "stop", True
                return
            if ranking is not None:
                yield from self._report_logprobs(token, ranking)
            yield from text.add(token)
            context.update(text.provisional, text.thought, ids)
            if text.stopped:
                self._reason = "stop"
                return
            if guard.begins_to_circle(text.thought):
                budget.tighten(text.reasoning_tokens)
            if guard.loops(token, thinking=text.thinking):
                if not self._close_thought(decoder, LOOP_IN_THOUGHT):
                    # half a document is no document
                    self._reason = "length" if self._constraint else "stop"
                    self._detail = LOOP_IN_ANSWER
                    return
                guard.begin_part()

    def _report_logprobs(self, token: int, ranking: Ranking) -> Iterator[Logprobs]:
        tokenizer = self._context.engine.tokenizer
        if token in (tokenizer.think_open_id, tokenizer.think_close_id) and not self._context.is_plain:
            return
        yield describe_draw(tokenizer, token, ranking, in_thought=self._text.thinking)

    def _close_thought(self, decoder: AnyDecoder, why: str) -> bool:
        """Force the end of an open thought; returns whether there is one."""
        close = self._context.engine.tokenizer.think_close_id
        if not self._text.thinking or close is None:
            return False
        decoder.force(close)
        self._detail = why
        return True

    def _done(self) -> Done:
        text = self._text
        full = self._reason == "length" and self._room < self.settings.max_new_tokens
        done = Done(
            finish_reason=self._reason,
            text=text.text,
            thinking=text.thought if self.settings.include_reasoning else "",
            raw_text=self._context.engine.tokenizer.decode(self.output.ids),
            prompt_tokens=len(self.prompt),
            cached_tokens=self._cached,
            prefilled_tokens=self.prefilled_tokens,
            reasoning_tokens=text.reasoning_tokens,
            generated_tokens=len(self.output.ids),
            thinking_cut=text.thinking,
            context_full=full,
            detail=self._explain(full=full),
            tool_calls=tuple(text.calls),
            stop_string=text.stop_string,
            unread_call=text.has_unread_call,
        )
        if not self.settings.report_performance:
            return done
        return replace(done, performance=self._clock.performance(self.prefilled_tokens))

    def _explain(self, *, full: bool) -> str:
        """Return what the user should know about the end of the reply."""
        if full:
            return CONTEXT_FULL.format(self._context.context_limit)
        return self._detail or (UNREAD_CALL if self._text.has_unread_call else "")

    def settle(self) -> None:
        """Write the message into the output, even if the reply was abandoned."""
        if self._settled:
            return
        self._settled = True
        for _ in self._text.flush(cut=not self._ended):
            pass
        text = self._text.text.strip() if self._text.calls else self._text.text
        calls = [{"name": call.name, "arguments": call.arguments} for call in self._text.calls]
        self.output.message = assistant_message(text, self._text.thought, calls)
        if self._text.stopped:
            self._roll_back()

    def _roll_back(self) -> None:
        """Take back what the user was not shown, a stop string or a repeated call, from ids and live state.

        A recurrent state cannot be trimmed, so a snapshot is restored; the shown ids are read again with the
        next prompt, or before it in idle time.
        """
        shown = self._text.shown_ids(self.output.ids)
        end = self._context.engine.tokenizer.token_id("<|im_end|>")
        # a reply without ids would not count as one
        self.output.ids = shown or ([end] if end is not None else self.output.ids)
        self._context.live.sync([*self.prompt, *shown])


def _make_constraint(context: ReplyContext, settings: ReplySettings, *, thinking: bool) -> Constraint | None:
    """Return what the answer is constrained to, None for any answer."""
    engine = context.engine
    form = AnswerForm(
        settings.schema,
        context.tools,
        call_style(engine.template.source),
        context.forced_call,
        context.strict_tools,
    )
    return None if form.is_free else Constraint(engine.vocabulary, form, in_thought=thinking)
