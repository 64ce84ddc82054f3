"""How a front end and an engine process talk: one JSON object a line, in ASCII, over stdin and stdout.

    request  {"id": 7, "method": "send", "params": {...}}
    event    {"id": 7, "event": "text", ...}, or several at once: {"id": 7, "events": [{...}, ...]}
    result   {"id": 7, "result": {...}}       one of these two ends a call, and comes once
    error    {"id": 7, "error": {"kind": "WeightsError", "message": "one sentence", "exit_code": 3}}
    unasked  {"event": "ready", "protocol": 1, "pid": 4711}, the first line; {"event": "log", "text": ...};
             {"event": "background", "text": ...}, what is done beside all calls, empty when that is over;
             an error whose id is null, for a line that is no request

Events of a reply are those of `events.py`. Besides: `load` (done_nbytes, total_nbytes, detail), `unloaded`,
`memory` (active_nbytes, cache_nbytes, peak_nbytes, limit_nbytes, copy_bandwidth), of jobs `progress` (done,
total, unit, detail, seconds_left) and `row`. METHODS lists what can be asked. Owns the form of the lines;
refuses lines over 64 MiB and parameters of a wrong type.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ..errors import QchatError, UsageError

PROTOCOL_VERSION = 1
MAX_LINE_NBYTES = 64 << 20
# holds the front end's process number, where that is not the engine's parent
FRONT_VARIABLE = "QCHAT_FRONT"

# the type of each parameter; what may be None may be left out
Parameters = Mapping[str, Any]
_SETTINGS = {"settings": dict | None}
CHAT_METHODS: Mapping[str, Parameters] = {
    "load": {
        "model": str,
        "system": str | None,
        "defaults": dict | None,
        "history": str | None,
        "quantized_kv": bool | None,
        "context_limit": int | None,
        "snapshot_budget": int | None,
        "conversation": int | None,
        "store": str | None,
    },
    "unload": {},
    "send": {"text": str, **_SETTINGS},
    "retry": _SETTINGS,
    "edit": {"turn": int, "text": str, **_SETTINGS},
    "answer_tools": {"results": list, **_SETTINGS},
    "undo": {},
    "fork": {"turn": int},
    "switch": {"number": int},
    "reset": {},
    "prime": {"messages": list},
    "set_system": {"text": str | None},
    "history": {"mode": str},
    "open": {"conversation": int},
    "rename": {"title": str},
    "state": {},
    "explain": {},
    "prompt": {"text": str | None, **_SETTINGS},
    "count": {"text": str},
    "memory": {},
    "save_state": {},
    "shutdown": {},
}
# served while something else runs, and before anything that waits
URGENT_METHODS: Mapping[str, Parameters] = {"cancel": {"id": int}, "close_thought": {}}
JOB_METHODS: Mapping[str, Parameters] = {
    "convert": {
        "source": str,
        "target": str,
        "options": dict | None,
        "imatrix": str | None,
        "awq": str | None,
        "dequantize": bool | None,
        "force": bool | None,
        "flags": list | None,
    },
    "calibrate": {
        "model": str,
        "output": str,
        "data": str | None,
        "chunk_size": int | None,
        "chunks": int | None,
    },
    "eval": {
        "model": str,
        "reference": str | None,
        "data": str | None,
        "context": int | None,
        "measurements": str | None,
    },
    "bench": {"models": list, "runs": int | None, "measurements": str | None},
    "compare": {"models": list, "text": str, "system": str | None, **_SETTINGS},
    "inspect": {"model": str, "tensors": bool | None},
    "plan": {"source": str, "options": dict | None, "bandwidth": float | int | None},
    "fetch": {"id": str, "revision": str | None},
}
METHODS: Mapping[str, Parameters] = {**CHAT_METHODS, **URGENT_METHODS, **JOB_METHODS}


class Cancelled(QchatError):
    """What a call that was cancelled ends with, unless it is a reply: that has a `Done`."""

    exit_code = 130


@dataclass(frozen=True)
class Request:
    """One call; `params` holds a value for every parameter of the method, None where none was given."""

    id: int
    method: str
    params: Mapping[str, Any]

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> "Request":
        """Raises UsageError for what is no request, an unknown method and wrong parameters."""
        number, method, params = message.get("id"), message.get("method"), message.get("params", {})
        if not _is(number, int) or not isinstance(method, str) or not isinstance(params, dict):
            raise UsageError("a line is no request: wanted id, method and params")
        if method not in METHODS:
            raise UsageError(f"there is no method {method!r:.40}")
        return cls(number, method, _checked(method, params))  # pyright: ignore[reportArgumentType]


def _checked(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    wanted = METHODS[method]
    if unknown := sorted(params.keys() - wanted.keys()):
        raise UsageError(
            f"{method} has no parameter {unknown[0]!r:.40}: it has {', '.join(wanted) or 'none'}"
        )
    for name, kind in wanted.items():
        if not _is(params.get(name), kind):
            found = "missing" if name not in params else f"{params[name]!r:.40}"
            raise UsageError(f"{method}: the parameter {name} is {found}, wanted {_shown(kind)}")
    return {name: params.get(name) for name in wanted}


def _is(value: object, kind: Any) -> bool:
    """JSON's values have exact types, so that true is no 1."""
    return type(value) in (get_args(kind) or (kind,))


def _shown(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def encode(message: Mapping[str, Any]) -> bytes:
    """The message as a line of ASCII, which whoever passes it on may cut anywhere; a float that is no number,
    which JSON has no word for, becomes null."""
    try:
        return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    except ValueError:
        return encode(_without_nan(message))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(line: bytes) -> dict[str, Any]:
    """The object in a line. Raises UsageError for anything else."""
    if len(line) > MAX_LINE_NBYTES:
        raise UsageError(f"a line has more than {MAX_LINE_NBYTES >> 20} MiB")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise UsageError(f"a line is not JSON: {problem}") from problem
    if not isinstance(message, dict):
        raise UsageError("a line is no JSON object")
    return message


def error_message(error: QchatError, number: int | None) -> dict[str, Any]:
    """The line that ends call `number` with `error`."""
    fields = {"kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    return {"id": number, "error": fields}
