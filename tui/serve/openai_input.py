"""What the OpenAI interfaces share: messages, tools, settings and usage in that spelling."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ...core.events import Done, Logprobs, TokenProbability
from .errors import RequestError

# how much to think, in words that other servers know
EFFORTS = {"minimal": "low", "max": "xhigh"}
TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")


class Sampling(msgspec.Struct, kw_only=True):
    """The fields of a request that choose how ids are drawn; ranges are checked by the engine."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    thinking_token_budget: int | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings of the reply that were given."""
        given = msgspec.structs.asdict(self)
        kwargs = self.chat_template_kwargs or {}
        names = [*Sampling.__struct_fields__]
        found = {name: given[name] for name in names if given[name] is not None}
        found.pop("chat_template_kwargs", None)
        if isinstance(kwargs.get("enable_thinking"), bool):
            found["enable_thinking"] = kwargs["enable_thinking"]
        return found


def effort_setting(effort: str | None) -> dict[str, Any]:
    """Return the setting for a reasoning effort."""
    return {} if effort is None else {"reasoning_effort": EFFORTS.get(effort, effort)}


def require_one_choice(n: int) -> None:
    """Raise RequestError where a client wants more than one choice, or none."""
    if n != 1:
        raise RequestError(400, f"n is {n}, but one choice is all there is", param="n")


def stop_setting(stop: str | Sequence[str] | None) -> dict[str, Any]:
    """Return the setting for stop strings."""
    return {} if stop is None else {"stop": [stop] if isinstance(stop, str) else list(stop)}


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with parts of one kind, and calls and results in today's spelling."""
    plain = {**message, "content": plain_content(message.get("content"))}
    if plain.get("role") == "function":
        plain |= {"role": "tool", "tool_call_id": message.get("name")}
    call = plain.pop("function_call", None)
    if isinstance(call, Mapping) and not plain.get("tool_calls"):
        plain["tool_calls"] = [{"id": call.get("name"), "type": "function", "function": dict(call)}]
    return plain


def plain_content(content: Any) -> Any:
    """Return content whose parts of text are all called so; others are left for the engine to refuse."""
    if not isinstance(content, list):
        return content
    return [_plain_part(part) for part in content]


def _plain_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in TEXT_PARTS:
        return {"type": "text", "text": part.get("text")}
    return {"type": "text", "text": part.get("refusal")} if kind == "refusal" else part


def function_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the tools that are functions, in the template's form, and the names of what the others are."""
    functions: list[dict[str, Any]] = []
    others: list[str] = []
    for tool in tools or ():
        if tool.get("type", "function") != "function":
            others.append(f"tools[{tool.get('type')}]")
            continue
        given = tool.get("function", tool)
        if not isinstance(given, Mapping):
            raise RequestError(400, "tools: a function must be an object", param="tools")
        kept = {name: given[name] for name in ("name", "description", "parameters") if name in given}
        functions.append({"type": "function", "function": kept})
    return functions, others


def strict_tools(tools: Sequence[Mapping[str, Any]] | None, kept: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the `kept` tools whose calls must satisfy their schemas."""
    functions = [tool.get("function", tool) for tool in tools or ()]
    strict = [one.get("name") for one in functions if isinstance(one, Mapping) and one.get("strict") is True]
    return [tool["function"]["name"] for tool in kept if tool["function"].get("name") in strict]


def choose_tools(
    tools: list[dict[str, Any]], choice: str | Mapping[str, Any] | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Return the tools that a `tool_choice` leaves, and the call that it forces: a name, or empty for any."""
    if choice == "none":
        return [], None
    if choice in ("required", "any"):
        return tools, ""
    if choice in (None, "auto"):
        return tools, None
    if isinstance(choice, Mapping):
        named = choice.get("function", choice)
        name = named.get("name") if isinstance(named, Mapping) else None
        if isinstance(name, str):
            return tools, name
    raise RequestError(400, "tool_choice is neither auto, none, required nor a function", param="tool_choice")


def constraint_of(form: Any) -> dict[str, Any] | None:
    """Return the form that the answer must have, from a `response_format`; None for any text."""
    if form is None:
        return None
    if isinstance(form, Mapping):
        kind, given = form.get("type"), form.get("json_schema", form)
        if kind in (None, "text"):
            return None
        if kind == "json_object":
            return {"type": "json_object"}
        schema = given.get("schema") if isinstance(given, Mapping) else None
        if kind == "json_schema" and isinstance(schema, Mapping):
            return {"type": "json_schema", "schema": dict(schema)}
    raise RequestError(400, "response_format is no text, json_object or json_schema", param="response_format")


def usage(done: Done) -> dict[str, Any]:
    """Return the token counts of a reply as chat completions have them."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.generated_tokens,
        "total_tokens": done.prompt_tokens + done.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
    }


def token_logprob(event: Logprobs) -> dict[str, Any]:
    """Return the log probability of one token of the answer."""
    return {**_probability(event.token), "top_logprobs": [_probability(one) for one in event.top]}


def _probability(one: TokenProbability) -> dict[str, Any]:
    return {"token": token_text(one), "logprob": one.logprob, "bytes": list(one.data)}


def token_text(one: TokenProbability) -> str:
    """Return the text of a token; an incomplete character becomes U+FFFD."""
    return bytes(one.data).decode(errors="replace")


def new_id(prefix: str) -> str:
    """Return a new identifier."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    """Return the time in seconds since 1970."""
    return int(time.time())


def error_body(error: RequestError) -> dict[str, Any]:
    """Return an error as the OpenAI interfaces write it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {"message": error.message, "type": kind, "param": error.param, "code": error.code},
    }
