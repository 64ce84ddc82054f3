"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's interface, whole and streamed."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ...core.events import CallEvent, Done, Logprobs, Prefill, Text, Thought, ToolUse
from .backend import Backend, Completion
from .bodies import ignored_fields, read_fields
from .endpoint import Parsed, sse
from .errors import RequestError
from .openai_input import EFFORTS, constraint_of, new_id, stop_setting, strict_tools

# clients send it back with a thought; it proves nothing, but they drop thoughts without one
SIGNATURE = "qchat"
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class CountBody(msgspec.Struct, kw_only=True):
    """The fields that the length of a prompt depends on."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesBody(CountBody, kw_only=True):
    """The fields that are read. `cache_control` anywhere is accepted: everything is cached anyway."""

    max_tokens: int
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    cache_control: dict[str, Any] | None = None


def error_body(error: RequestError) -> dict[str, Any]:
    """Return an error as Anthropic's interface writes it."""
    kind = ERROR_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class Messages:
    """The dialect of messages."""

    error = staticmethod(error_body)

    def read(self, body: dict[str, Any], backend: Backend) -> Parsed:
        """Parse a body. Raises RequestError."""
        fields = read_fields(body, MessagesBody)
        completion, others = _completion(fields, backend)
        sampling = {"temperature": fields.temperature, "top_p": fields.top_p, "top_k": fields.top_k}
        completion.settings.update({
            "max_new_tokens": fields.max_tokens,
            **stop_setting(fields.stop_sequences),
            **{name: value for name, value in sampling.items() if value is not None},
        })  # fmt: skip
        hint = (fields.metadata or {}).get("user_id")
        ignored = [*ignored_fields(body, MessagesBody), *others]
        answer = MessageAnswer(fields.model or backend.model_name)
        return Parsed(completion, answer, fields.stream, ignored, hint if isinstance(hint, str) else "")

    def read_count(self, body: dict[str, Any], backend: Backend) -> Completion:
        """Parse the body of a request for the length of its prompt. Raises RequestError."""
        return _completion(read_fields(body, CountBody), backend)[0]


def _completion(fields: CountBody, backend: Backend) -> tuple[Completion, list[str]]:
    """Return what to ask the engine, and what was ignored."""
    choice = fields.tool_choice or {}
    tools, others = _tools(fields.tools or []) if choice.get("type") != "none" else ([], [])
    forced = {"any": "", "tool": str(choice.get("name") or "")}.get(str(choice.get("type")))
    completion = Completion(
        messages=[*_system(fields.system), *(one for message in fields.messages for one in _plain(message))],
        tools=tools or None,
        forced_call=forced,
        strict_tools=strict_tools(fields.tools, tools),
        constraint=constraint_of((fields.output_config or {}).get("format")),
        settings=backend.settings | _thinking(fields),
        parallel_calls=choice.get("disable_parallel_tool_use") is not True,
    )
    return completion, others


def _thinking(fields: CountBody) -> dict[str, Any]:
    """Return the settings of the thought: off, as here, unless it is asked for."""
    kind, effort = (fields.thinking or {}).get("type"), (fields.output_config or {}).get("effort")
    if kind in (None, "disabled"):
        return {"enable_thinking": False}
    budget = (fields.thinking or {}).get("budget_tokens")
    found: dict[str, Any] = {"enable_thinking": True}
    found |= {"thinking_token_budget": budget} if budget is not None else {}
    return found | ({"reasoning_effort": EFFORTS.get(effort, effort)} if isinstance(effort, str) else {})


def _system(system: str | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    if not system:
        return []
    texts = [system] if isinstance(system, str) else [_text(block, "system") for block in system]
    return [{"role": "system", "content": "\n\n".join(texts)}]


def _tools(tools: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the tools in the template's form, and the kinds of those that only Anthropic's servers have."""
    kept: list[dict[str, Any]] = []
    others: list[str] = []
    for tool in tools:
        if "input_schema" not in tool:
            others.append(f"tools[{tool.get('type')}]")
            continue
        function = {"name": tool.get("name"), "description": tool.get("description")}
        given = {name: value for name, value in function.items() if value is not None}
        kept.append({"type": "function", "function": {**given, "parameters": tool["input_schema"]}})
    return kept, others


def _plain(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a message in the template's form; results of tools become messages of their own, first."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        yield {"role": role, "content": content}
        return
    texts: list[str] = []
    pictures: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in content:
        match block:
            case {"type": "tool_result", "tool_use_id": str(id)}:
                yield {"role": "tool", "tool_call_id": id, "content": _result(block)}
            case {"type": "tool_use", "name": str(name)}:
                function = {"name": name, "arguments": block.get("input") or {}}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case {"type": "thinking", "thinking": str(thought)}:
                thoughts.append(thought)
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "image", "source": {**source}}:
                pictures.append(_picture(source))
            case _:
                texts.append(_text(block, "messages"))
    if texts or pictures or calls or thoughts or not content:
        text = ("" if role == "assistant" else "\n\n").join(texts)
        parts = [*pictures, {"type": "text", "text": text}] if pictures else text
        plain: dict[str, Any] = {"role": role, "content": parts}
        plain |= {"reasoning_content": "\n\n".join(thoughts)} if any(thoughts) else {}
        yield plain | ({"tool_calls": calls} if calls else {})


def _picture(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a picture as the engine takes it. Raises RequestError for one that would have to be fetched."""
    match source:
        case {"type": "base64", "media_type": str(kind), "data": str(data)}:
            return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
    raise RequestError(400, "messages: a picture must be in base64: nothing is fetched", param="messages")


def _result(block: Mapping[str, Any]) -> str:
    content = block.get("content") or ""
    if isinstance(content, str):
        text = content
    elif isinstance(content, list):
        text = "\n".join(_text(part, "tool_result") for part in content)
    else:
        raise RequestError(400, "tool_result: content is neither text nor a list of blocks", param="messages")
    return f"Error: {text}" if block.get("is_error") is True else text


def _text(block: Any, where: str) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("text"), str):
        return block["text"]
    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
    raise RequestError(400, f"{where}: a block of type {kind!r:.40} cannot be read, only text", param=where)


class MessageAnswer:
    """The answer to one request: blocks of thought, text and tool use, one open at a time."""

    def __init__(self, model: str):
        self._about = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
        self._index = -1
        self._open = ""  # the type of the open block

    def begin(self, prompt: Prefill) -> Iterable[bytes]:
        empty = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._about, **empty, "usage": _usage(prompt.total, prompt.cached, 0)}
        yield _event("message_start", message=message)

    def add(self, event: CallEvent) -> Iterator[bytes]:
        match event:
            case Thought(text):
                yield from self._continue("thinking", {"thinking": "", "signature": ""})
                yield self._delta("thinking_delta", thinking=text)
            case Text(text):
                yield from self._continue("text", {"text": ""})
                yield self._delta("text_delta", text=text)
            case ToolUse(name, arguments):
                yield from self._close()
                yield from self._start("tool_use", {"id": new_id("toolu_"), "name": name, "input": {}})
                written = json.dumps(arguments)
                yield self._delta("input_json_delta", partial_json=written)
                yield from self._close()

    def end(self, done: Done) -> Iterator[bytes]:
        yield from self._close()
        reason, stop = _stop_reason(done)
        yield _event(
            "message_delta",
            delta={"stop_reason": reason, "stop_sequence": stop},
            usage=_usage(done.prompt_tokens, done.cached_tokens, done.generated_tokens),
        )
        yield _event("message_stop")

    def fail(self, error: RequestError) -> Iterator[bytes]:
        yield sse(error_body(error), "error")

    def whole(self, done: Done, logprobs: list[Logprobs]) -> dict[str, Any]:
        del logprobs
        content: list[dict[str, Any]] = []
        if done.thinking:
            content.append({"type": "thinking", "thinking": done.thinking, "signature": SIGNATURE})
        if text := done.text.strip() if done.tool_calls else done.text:
            content.append({"type": "text", "text": text})
        content += [
            {"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": call.arguments}
            for call in done.tool_calls
        ]
        reason, stop = _stop_reason(done)
        counts = _usage(done.prompt_tokens, done.cached_tokens, done.generated_tokens)
        end = {"stop_reason": reason, "stop_sequence": stop, "usage": counts}
        return {**self._about, "content": content, **end}

    def _continue(self, kind: str, empty: dict[str, Any]) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._close()
            yield from self._start(kind, empty)

    def _start(self, kind: str, empty: dict[str, Any]) -> Iterator[bytes]:
        self._index, self._open = self._index + 1, kind
        yield _event("content_block_start", index=self._index, content_block={"type": kind, **empty})

    def _close(self) -> Iterator[bytes]:
        if self._open == "thinking":
            yield self._delta("signature_delta", signature=SIGNATURE)
        if self._open:
            yield _event("content_block_stop", index=self._index)
        self._open = ""

    def _delta(self, kind: str, **fields: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **fields})


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _usage(prompt: int, cached: int, generated: int) -> dict[str, int]:
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }


def _stop_reason(done: Done) -> tuple[str, str | None]:
    """Return why the reply ended, and the stop string that ended it, if one did."""
    if done.finish_reason == "length":
        return "max_tokens", None
    if done.tool_calls:
        return "tool_use", None
    return ("stop_sequence", done.stop_string) if done.stop_string else ("end_turn", None)
