"""The answer to `POST /v1/responses`: output items, and the events of their stream."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...core.events import CallEvent, Done, Logprobs, Prefill, Text, Thought, ToolUse
from .endpoint import sse
from .errors import RequestError
from .openai_input import error_body, new_id, now

Item = dict[str, Any]


class ResponseAnswer:
    """The answer to one request: items of reasoning, message and function calls, one open at a time."""

    def __init__(self, echo: dict[str, Any], remember: Callable[[str, dict[str, Any]], None]):
        """`echo` are the fields that the response repeats; `remember` takes its id and message."""
        self._about = {"id": new_id("resp_"), "object": "response", "created_at": now(), **echo}
        self._remember = remember
        self._items: list[Item] = []
        self._open: Item = {}
        self._sequence = 0

    def begin(self, prompt: Prefill) -> Iterable[bytes]:
        del prompt
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def add(self, event: CallEvent) -> Iterator[bytes]:
        match event:
            case Thought(text):
                yield from self._continue("reasoning", reasoning_item(""))
                yield self._delta("reasoning_text", text)
            case Text(text):
                yield from self._continue("message", message_item(""))
                yield self._delta("output_text", text)
            case ToolUse():
                yield from self._close()
                yield from self._add_call(event)

    def end(self, done: Done) -> Iterator[bytes]:
        yield from self._close()
        response = self._finish(done, self._items)
        kind = "response.incomplete" if done.finish_reason == "length" else "response.completed"
        yield self._event(kind, response=response)

    def fail(self, error: RequestError) -> Iterator[bytes]:
        found = error_body(error)["error"]
        failed = self._response(
            "failed", error={"code": found["code"] or found["type"], "message": str(error)}
        )
        yield self._event("response.failed", response=failed)

    def whole(self, done: Done, logprobs: list[Logprobs]) -> dict[str, Any]:
        del logprobs
        items = [reasoning_item(done.thinking)] if done.thinking else []
        text = done.text.strip() if done.tool_calls else done.text
        items += [message_item(text)] if text or not done.tool_calls else []
        return self._finish(done, [*items, *map(call_item, done.tool_calls)])

    # items

    def _continue(self, kind: str, empty: Item) -> Iterator[bytes]:
        """Open an item of this kind, unless one is open."""
        if self._open.get("type") == kind:
            return
        yield from self._close()
        self._open = empty
        shown = {**empty, "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=len(self._items), item=shown)
        part = {**empty["content"][0], "text": ""}
        yield self._event("response.content_part.added", **self._place(), part=part)

    def _delta(self, kind: str, text: str) -> bytes:
        self._open["content"][0]["text"] += text
        extra = {"logprobs": []} if kind == "output_text" else {}
        return self._event(f"response.{kind}.delta", **self._place(), delta=text, **extra)

    def _close(self) -> Iterator[bytes]:
        """End the open item, if there is one."""
        item = self._open
        if not item:
            return
        part = item["content"][0]
        extra = {"logprobs": []} if part["type"] == "output_text" else {}
        yield self._event(f"response.{part['type']}.done", **self._place(), text=part["text"], **extra)
        yield self._event("response.content_part.done", **self._place(), part=part)
        yield from self._end_item(item)
        self._open = {}

    def _add_call(self, call: ToolUse) -> Iterator[bytes]:
        item, index = call_item(call), len(self._items)
        shown = {**item, "status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=index, item=shown)
        place = {"item_id": item["id"], "output_index": index}
        arguments = item["arguments"]
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        done = {**place, "name": call.name, "arguments": arguments}
        yield self._event("response.function_call_arguments.done", **done)
        yield from self._end_item(item)

    def _end_item(self, item: Item) -> Iterator[bytes]:
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._open["id"], "output_index": len(self._items), "content_index": 0}

    # the response

    def _finish(self, done: Done, items: list[Item]) -> dict[str, Any]:
        self._items = items
        self._remember(self._about["id"], message_of(items))
        if done.finish_reason == "length":
            why = {"reason": "max_output_tokens"}
            return self._response("incomplete", done, incomplete_details=why)
        return self._response("completed", done)

    def _response(self, status: str, done: Done | None = None, **fields: Any) -> dict[str, Any]:
        usual = {"error": None, "incomplete_details": None}
        counts = {"usage": response_usage(done) if done else None}
        return {**self._about, "status": status, "output": list(self._items), **usual, **counts, **fields}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        return sse({"type": kind, "sequence_number": self._sequence - 1, **fields}, kind)


def reasoning_item(text: str) -> Item:
    """Return an item with the thought of a reply."""
    content = [{"type": "reasoning_text", "text": text}]
    return {
        "id": new_id("rs_"),
        "type": "reasoning",
        "summary": [],
        "content": content,
        "status": "completed",
    }


def message_item(text: str) -> Item:
    """Return an item with the answer of a reply."""
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    item = {"id": new_id("msg_"), "type": "message", "role": "assistant"}
    return {**item, "content": content, "status": "completed"}


def call_item(call: ToolUse) -> Item:
    """Return an item with a call; its arguments are a string."""
    item = {"id": new_id("fc_"), "type": "function_call", "call_id": new_id("call_"), "name": call.name}
    return {**item, "arguments": json.dumps(call.arguments), "status": "completed"}


def message_of(items: Iterable[Item]) -> dict[str, Any]:
    """Return the items of a reply as the message that the next request has as history."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: list[dict[str, Any]] = []
    for item in items:
        match item["type"]:
            case "reasoning":
                message["reasoning_content"] = item["content"][0]["text"]
            case "message":
                message["content"] += item["content"][0]["text"]
            case "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                calls.append({"id": item["call_id"], "type": "function", "function": function})
    return message | ({"tool_calls": calls} if calls else {})


def response_usage(done: Done) -> dict[str, Any]:
    """Return the token counts of a reply as responses have them."""
    return {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.cached_tokens},
        "output_tokens": done.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
        "total_tokens": done.prompt_tokens + done.generated_tokens,
    }
