"""`POST /v1/chat/completions`, whole and streamed."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from ...core.events import CallEvent, Done, Logprobs, Prefill, Text, Thought, ToolUse
from .backend import Backend, Completion
from .bodies import ignored_fields, read_fields
from .endpoint import Parsed, sse
from .errors import RequestError
from .openai_input import (
    Sampling,
    choose_tools,
    constraint_of,
    effort_setting,
    error_body,
    function_tools,
    new_id,
    now,
    plain_message,
    require_one_choice,
    stop_setting,
    strict_tools,
    token_logprob,
    usage,
)


class ChatBody(Sampling, kw_only=True):
    """The fields that are read; those of the last group say nothing to a local model."""

    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    n: int = 1
    response_format: dict[str, Any] | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


class ChatCompletions:
    """The dialect of chat completions."""

    error = staticmethod(error_body)

    def read(self, body: dict[str, Any], backend: Backend) -> Parsed:
        """Parse a body. Raises RequestError."""
        fields = read_fields(body, ChatBody)
        require_one_choice(fields.n)
        given, others = function_tools(fields.tools)
        tools, forced = choose_tools(given, fields.tool_choice)
        completion = Completion(
            messages=[plain_message(message) for message in fields.messages],
            tools=tools or None,
            forced_call=forced,
            strict_tools=strict_tools(fields.tools, tools),
            constraint=constraint_of(fields.response_format),
            settings=backend.settings | _settings(fields),
            parallel_calls=fields.parallel_tool_calls,
        )
        answer = ChatAnswer(
            fields.model or backend.model_name,
            logprobs=fields.logprobs,
            include_usage=bool((fields.stream_options or {}).get("include_usage")),
        )
        hint = fields.prompt_cache_key or fields.safety_identifier or fields.user or ""
        return Parsed(completion, answer, fields.stream, [*ignored_fields(body, ChatBody), *others], hint)


def _settings(fields: ChatBody) -> dict[str, Any]:
    limit = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    top = (fields.top_logprobs or 0) if fields.logprobs else None
    named = {"max_new_tokens": limit, "top_logprobs": top}
    return {
        **fields.settings(),
        **effort_setting(fields.reasoning_effort),
        **stop_setting(fields.stop),
        **{name: value for name, value in named.items() if value is not None},
    }


class ChatAnswer:
    """The answer to one request."""

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool):
        self._about = {"id": new_id("chatcmpl-"), "created": now(), "model": model}
        self._logprobs, self._include_usage = logprobs, include_usage
        self._waiting: list[dict[str, Any]] = []  # log probabilities of text that is held back
        self._calls = 0

    def begin(self, prompt: Prefill) -> Iterable[bytes]:
        del prompt
        yield self._chunk({"role": "assistant", "content": ""})

    def add(self, event: CallEvent) -> Iterator[bytes]:
        match event:
            case Thought(text):
                yield self._chunk({"reasoning_content": text})
            case Text(text):
                yield self._chunk({"content": text})
            case ToolUse():
                call = {"index": self._calls, **call_object(event)}
                self._calls += 1
                yield self._chunk({"tool_calls": [call]})
            case Logprobs(in_thought=False):
                self._waiting.append(token_logprob(event))

    def end(self, done: Done) -> Iterator[bytes]:
        yield self._chunk({}, finish_reason(done))
        if self._include_usage:
            about = {**self._about, "object": "chat.completion.chunk", "choices": []}
            yield sse({**about, "usage": usage(done)})
        yield sse("[DONE]")

    def fail(self, error: RequestError) -> Iterator[bytes]:
        yield sse(error_body(error))

    def whole(self, done: Done, logprobs: list[Logprobs]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None}
        if done.thinking:
            message["reasoning_content"] = done.thinking
        if done.tool_calls:
            message["content"] = done.text.strip() or None
            message["tool_calls"] = [call_object(call) for call in done.tool_calls]
        found = [token_logprob(event) for event in logprobs if not event.in_thought]
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": finish_reason(done),
            "logprobs": {"content": found, "refusal": None} if self._logprobs else None,
        }
        return {**self._about, "object": "chat.completion", "choices": [choice], "usage": usage(done)}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        found, self._waiting = self._waiting, []
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": reason,
            "logprobs": {"content": found, "refusal": None} if found else None,
        }
        return sse({**self._about, "object": "chat.completion.chunk", "choices": [choice]})


def call_object(call: ToolUse) -> dict[str, Any]:
    """Return a tool call; its arguments are a string."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    return {"id": new_id("call_"), "type": "function", "function": function}


def finish_reason(done: Done) -> str:
    """Return why the reply ended."""
    if done.finish_reason == "length":
        return "length"
    return "tool_calls" if done.tool_calls else "stop"
