"""`POST /v1/responses`: requests and the memory of earlier responses, for `previous_response_id`."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...core.quoting import quote_value
from .backend import Backend, Completion
from .bodies import ignored_fields, read_fields
from .endpoint import Parsed
from .errors import RequestError
from .openai_input import (
    Sampling,
    choose_tools,
    constraint_of,
    effort_setting,
    error_body,
    function_tools,
    plain_message,
    stop_setting,
    strict_tools,
)
from .response_events import ResponseAnswer

Message = dict[str, Any]
# responses that are remembered, and the characters of all messages up to each
MAX_RESPONSES, MAX_CHARACTERS = 1000, 32 << 20


class ResponsesBody(Sampling, kw_only=True):
    """The fields that are read; those of the last group say nothing to a local model."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    stream: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    stop: str | list[str] | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    truncation: str | None = None


class ResponseMemory:
    """The messages up to each response; the one that was used least recently is forgotten first."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_characters: int = MAX_CHARACTERS):
        self._max_responses, self._max_characters = max_responses, max_characters
        self._kept: OrderedDict[str, tuple[list[Message], int]] = OrderedDict()
        self._characters = 0

    def find(self, id: str) -> list[Message]:
        """Return the messages up to a response and its own. Raises RequestError (404) for an unknown one."""
        if id not in self._kept:
            raise RequestError(
                404, f"the response {quote_value(id)} is not remembered", param="previous_response_id"
            )
        self._kept.move_to_end(id)
        return self._kept[id][0]

    def keep(self, id: str, messages: list[Message]) -> None:
        """Remember the messages up to a response; each response counts all of them, shared or not."""
        size = sum(len(str(message)) for message in messages)
        self._kept[id] = (messages, size)
        self._characters += size
        while self._kept and (
            len(self._kept) > self._max_responses or self._characters > self._max_characters
        ):
            _, (_, dropped) = self._kept.popitem(last=False)
            self._characters -= dropped


class Responses:
    """The dialect of responses."""

    error = staticmethod(error_body)

    def __init__(self, memory: ResponseMemory | None = None):
        self._memory = memory or ResponseMemory()

    def read(self, body: dict[str, Any], backend: Backend) -> Parsed:
        """Parse a body. Raises RequestError."""
        fields = read_fields(body, ResponsesBody)
        earlier = self._memory.find(fields.previous_response_id) if fields.previous_response_id else []
        history = [*earlier, *_messages(fields.input)]
        given, others = function_tools(fields.tools)
        tools, forced = choose_tools(given, fields.tool_choice)
        completion = Completion(
            messages=[*_instructions(fields.instructions), *history],
            tools=tools or None,
            forced_call=forced,
            strict_tools=strict_tools(fields.tools, tools),
            constraint=constraint_of((fields.text or {}).get("format")),
            settings=backend.settings | _settings(fields),
            parallel_calls=fields.parallel_tool_calls,
        )

        def remember(id: str, reply: Message) -> None:
            if fields.store:
                self._memory.keep(id, [*history, reply])

        answer = ResponseAnswer(_echo(fields, backend), remember)
        hint = fields.prompt_cache_key or fields.safety_identifier or fields.user or ""
        ignored = [*ignored_fields(body, ResponsesBody), *others]
        return Parsed(completion, answer, fields.stream, ignored, hint)


def _instructions(text: str | None) -> list[Message]:
    """Return the system message of this request alone: earlier instructions are not carried over."""
    return [{"role": "system", "content": text}] if text else []


def _settings(fields: ResponsesBody) -> dict[str, Any]:
    effort = (fields.reasoning or {}).get("effort")
    limit = {} if fields.max_output_tokens is None else {"max_new_tokens": fields.max_output_tokens}
    return {
        **fields.settings(),
        **effort_setting(effort if isinstance(effort, str) else None),
        **stop_setting(fields.stop),
        **limit,
    }


def _echo(fields: ResponsesBody, backend: Backend) -> dict[str, Any]:
    """Return the fields of the request that a response repeats."""
    return {
        "model": fields.model or backend.model_name,
        "instructions": fields.instructions,
        "previous_response_id": fields.previous_response_id,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls,
        "reasoning": fields.reasoning or {"effort": None, "summary": None},
        "store": fields.store,
        "temperature": fields.temperature,
        "text": fields.text or {"format": {"type": "text"}},
        "tool_choice": fields.tool_choice or "auto",
        "tools": fields.tools or [],
        "top_p": fields.top_p,
        "truncation": fields.truncation or "disabled",
        "user": fields.user,
    }


def _messages(given: str | Sequence[Mapping[str, Any]]) -> Iterator[Message]:
    """Yield the input as messages. Raises RequestError for an item that is none."""
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    for number, item in enumerate(given, 1):
        match item:
            case {"type": "function_call", "name": str(name)}:
                function = {"name": name, "arguments": item.get("arguments") or {}}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                yield {"role": "assistant", "content": "", "tool_calls": [call]}
            case {"type": "function_call_output"}:
                output = plain_message({"content": item.get("output")})["content"]
                yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
            case {"type": "reasoning"}:
                yield {"role": "assistant", "content": "", "reasoning_content": _thought(item)}
            case {"role": _}:
                yield plain_message({name: item[name] for name in ("role", "content") if name in item})
            case _:
                kind = quote_value(item.get("type"))
                raise RequestError(400, f"input, item {number}: a {kind} cannot be read", param="input")


def _thought(item: Mapping[str, Any]) -> str:
    """Return the text of a reasoning item."""
    parts = item.get("content") or item.get("summary") or []
    texts = (
        [part.get("text") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    )
    return "\n\n".join(text for text in texts if isinstance(text, str))
