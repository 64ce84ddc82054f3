"""Tool calls written as JSON: one object or several, with the keys that models use for name and arguments."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .argument_types import ArgumentType
from .loose_json import read_loosely

NAMES = ("name", "tool", "tool_name", "function_name", "function", "action")
ARGUMENTS = ("arguments", "parameters", "args", "input", "params", "tool_input", "action_input")
WRAPPERS = ("function", "tool_call", "function_call")
# what may stand before, between and after objects
GLUE = re.compile(r"(?:[\s,;\[\]})]|```(?:\w*\n)?)*")
MISSING_BRACE = re.compile(r"""["'](?:name|tool|function)["']\s*:""")

Types = Mapping[str, Mapping[str, ArgumentType]]


class JsonCall(NamedTuple):
    """A call, and the place where its text ends."""

    name: str
    arguments: dict[str, Any]
    end: int


def read_json_calls(text: str, start: int, types: Types, *, complete: bool = False) -> list[JsonCall]:
    """Return the calls from `start` on, up to the first text that is neither an object nor between two.

    Raises Unfinished where the text ends too early, and ValueError where there is no call.
    """
    calls: list[JsonCall] = []
    place, added = _after_glue(text, start), 0
    if MISSING_BRACE.match(text, place):
        text, added = f"{text[:place]}{{{text[place:]}", 1
    while text.startswith("{", place):
        try:
            value, end = read_loosely(text, place, complete=complete)
            found = _calls_of(value, types)
        except ValueError:
            if calls:
                break
            raise
        place = _after_glue(text, end)
        calls += [JsonCall(name, arguments, place - added) for name, arguments in found]
    if not calls:
        raise ValueError("there is no object")
    return calls


def read_arguments(value: Any, types: Mapping[str, ArgumentType] = {}) -> dict[str, Any]:
    """Return the arguments that a value holds, itself or below a key. Raises ValueError for none."""
    key = next((key for key in ARGUMENTS if isinstance(value, dict) and key in value), None)
    if key is not None and key not in types and set(value) <= {key, *NAMES}:
        value = value[key]
    if isinstance(value, str) and value.strip():
        value, _ = read_loosely(value)
    if not (isinstance(value, dict) or not value):
        raise ValueError("the arguments are no object")
    return value or {}


def _after_glue(text: str, place: int) -> int:
    return GLUE.match(text, place).end()  # pyright: ignore[reportOptionalMemberAccess]


def _calls_of(value: Any, types: Types) -> list[tuple[str, dict[str, Any]]]:
    """Return the calls that an object holds. Raises ValueError for none."""
    if isinstance(several := value.get("tool_calls"), list):
        return [_call(one, types) for one in several]
    return [_call(value, types)]


def _call(value: Any, types: Types) -> tuple[str, dict[str, Any]]:
    for key in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = {name: item for name, item in value.items() if name != key} | value[key]
    if not isinstance(value, dict):
        raise ValueError("a call is no object")
    name_key = next((key for key in NAMES if isinstance(value.get(key), str)), None)
    if name_key is None:
        return _keyed_call(value, types)
    name = value[name_key]
    key = next((key for key in ARGUMENTS if key in value), None)
    if key is not None:
        return name, read_arguments(value[key])
    others = {key: item for key, item in value.items() if key not in (name_key, "type", "id")}
    return name, others if set(others) <= set(types.get(name, ())) else {}


def _keyed_call(value: dict[str, Any], types: Types) -> tuple[str, dict[str, Any]]:
    """Return the call that is written as `{NAME: {ARGUMENT: ...}}`. Raises ValueError for another."""
    name, arguments = next(iter(value.items()), ("", None))
    if len(value) != 1 or name not in types or not isinstance(arguments, dict):
        raise ValueError("a call names no function")
    return name, arguments
