"""One stateless reply: a whole conversation, or a raw prompt, in; events and exactly one `Done` out.

Uses the machinery of a session's replies, on a live state of its own. Knows no tree, no store and no front
end. One reply at a time.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..calls.toolcalls import ToolCallParser
from ..conversation.encoder import Encoder
from ..conversation.pictures import read_messages
from ..conversation.reply import PendingReply, ReplyContext, Signals
from ..conversation.transcript import History, Input, Output, branch
from ..conversation.tree import turn_number
from ..engine.engine import Engine
from ..errors import UsageError
from ..events import Event
from ..generation.reply_settings import ReplySettings
from ..prompt_cache.live_state import LiveState
from ..quoting import quote_value
from ..storage.state_files import SERVED
from ..text.messages import arrange_messages
from .histories import Histories


@dataclass(frozen=True)
class CompletionRequest:
    """A request: `messages`, or a raw `prompt` as text or ids.

    `tools` are in the template's form. `forced_call` makes the answer a tool call: of that tool, or of any if
    it is empty; it ends before it repeats a call. The arguments of `strict_tools` satisfy their schemas, as
    those of forced calls do. Without `parallel_calls` the reply ends with its first call.
    `settings` are those of a reply. `constraint` is the form that the answer must have:
    `{"type": "json_object"}` or `{"type": "json_schema", "schema": ...}`; None for any.
    """

    messages: Sequence[Mapping[str, Any]] = ()
    prompt: str | Sequence[int] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    forced_call: str | None = None
    strict_tools: Sequence[str] = ()
    parallel_calls: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    constraint: Mapping[str, Any] | None = None


class Completer:
    """Replies to requests that bring their own history, with one engine."""

    def __init__(self, engine: Engine, live: LiveState, context_limit: int, image_tokens: int | None = None):
        """`live` is the state that the replies read with; the limits, of a picture too, are in tokens."""
        self.engine, self.live, self.context_limit = engine, live, context_limit
        self.image_tokens = image_tokens
        self.signals = Signals()
        self._encoder = Encoder(engine.template, engine.tokenizer, engine.images)
        self._histories = Histories(self._encoder)
        self._last: list[int] = []  # what a request that continues the last one begins with
        self._history: History = "preserve" if engine.template.can_preserve_thinking else "strip"

    def cancel(self) -> None:
        """Stop the reply at its next token or prefill chunk; callable from any thread."""
        self.signals.cancelled = True

    def save_state(self, *, unasked: bool = False) -> bool:
        """Save on disk what the last request read, for a request that continues it after a restart.

        Returns False where there is nothing to save, or the budget does not allow it. Raises DoesNotFit.
        """
        # after a restart the answer is known by its text alone, whose ids may differ
        return bool(self._last) and self.live.save(
            self._last, SERVED, answer_may_differ=True, unasked=unasked
        )

    def stream(self, request: CompletionRequest) -> Generator[Event]:
        """Reply to a request; yields events, and exactly one `Done` as the last.

        Raises UsageError for a setting, tool or id, TemplateError for messages the template refuses,
        ContextLengthExceeded before anything is computed.
        """
        begun, settings = time.perf_counter(), _parse_settings(request)
        self.signals.cancelled, self.signals.reason = False, ""
        output, history_ids = self._encode(request, settings)
        _check_calls(request)
        context = ReplyContext(
            self.engine,
            self.live,
            self.signals,
            [dict(tool) for tool in request.tools],
            self.context_limit,
            lambda *_: None,
            conversation=branch(output)[0],  # the same node for all requests that begin with this question
            is_plain=request.prompt is not None,
            forced_call=request.forced_call,
            strict_tools=frozenset(request.strict_tools),
            parallel_calls=request.parallel_calls,
        )
        reply = PendingReply(context, output, history_ids, settings, turn=turn_number(output), begun=begun)
        return self._run(reply, output.message["content"])

    def count(self, request: CompletionRequest) -> int:
        """Return the number of tokens of the request's prompt. Raises as `stream` does."""
        output, history_ids = self._encode(request, ReplySettings.parse(request.settings))
        return len(history_ids) + len(output.opener)

    def _run(self, reply: PendingReply, begun: str) -> Generator[Event]:
        """Run the reply, which continues the words `begun`, and remember what it read and drew."""
        try:
            yield from reply.run()
        finally:
            reply.settle()
            live = self.live
            if live.ids and len(live.ids) == live.cache.length:
                live.keep_snapshot("B", turn_number(reply.output), branch(reply.output)[0])
            self._last = [*reply.prompt, *reply.output.ids]
            if self._history == "strip":
                self._last = reply.prompt[: len(reply.prompt) - len(reply.output.opener)]
            if reply.output.ids and reply.output.parent.messages:
                self._histories.remember(reply.output, begun)

    def _encode(self, request: CompletionRequest, settings: ReplySettings) -> tuple[Output, list[int]]:
        """Return the reply without ids, with the words that it continues, and the ids before its opener."""
        if request.prompt is not None:
            ids = self._prompt_ids(request.prompt)
            return Output(Input(None, [], ids), []), ids
        ToolCallParser(request.tools)
        messages, _held = read_messages(request.messages, self.engine.images, self.image_tokens)
        messages = arrange_messages(messages)
        self._encoder.refuse_too_long(messages, self.context_limit)
        output = self._histories.next_reply(messages, self._switches(request, settings))
        return output, self._encoder.branch_ids(branch(output.parent), self._history)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            self._encoder.refuse_too_long([{"content": prompt}], self.context_limit)
            return self.engine.tokenizer.encode(prompt)
        size = self.engine.config.vocab_size
        wrong = [id for id in prompt if not isinstance(id, int) or not 0 <= id < size]
        if wrong:
            raise UsageError(f"the prompt has the id {wrong[0]!r:.40}, wanted ids from 0 to {size - 1:,}")
        return list(prompt)

    def _switches(self, request: CompletionRequest, settings: ReplySettings) -> dict[str, Any]:
        engine = self.engine
        switches = settings.template_switches(
            knows_efforts=engine.knows_efforts, thinks_by_default=engine.thinks_by_default
        )
        switches["preserve_thinking"] = self._history == "preserve"
        return switches | ({"tools": [dict(tool) for tool in request.tools]} if request.tools else {})


def _parse_settings(request: CompletionRequest) -> ReplySettings:
    match request.constraint:
        case None:
            return ReplySettings.parse(request.settings)
        case {"type": "json_object"}:
            schema = {"type": "object"}
        case {"type": "json_schema", "schema": Mapping() as schema}:
            pass
        case _:
            kinds = "json_object, or json_schema with a schema"
            raise UsageError(f"the constraint is {quote_value(request.constraint)}, wanted {kinds}")
    return ReplySettings.parse({**request.settings, "schema": schema})


def _check_calls(request: CompletionRequest) -> None:
    """Raise UsageError for a tool that is forced or strict but not given."""
    name, known = request.forced_call, [tool.get("function", tool)["name"] for tool in request.tools]
    if name is not None and (not known or name not in ("", *known)):
        raise UsageError(f"the tool {quote_value(name)} is to be called, but is none of the given tools")
    for strict in request.strict_tools:
        if strict not in known:
            raise UsageError(f"the tool {quote_value(strict)} is strict, but is none of the given tools")
