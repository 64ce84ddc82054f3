"""The protocol between a front end and an engine process: one JSON object per ASCII line on stdin and stdout.

    request  {"id": 7, "method": "send", "params": {...}}
    event    {"id": 7, "event": "text", ...}, or several at once: {"id": 7, "events": [{...}, ...]}
    result   {"id": 7, "result": {...}}       each call ends with one result or error
    error    {"id": 7, "error": {"kind": "WeightsError", "message": "one sentence", "exit_code": 3}}
    other    {"event": "ready", "protocol": 1, "pid": 4711}, the first line; {"event": "log", "text": ...};
             {"event": "background", "text": ...}, work beside all calls, empty at its end;
             an error with the id null, for an invalid line

Events are those of `events.py`; jobs send `notice`, `progress` (done, total, unit, detail, seconds_left) and
`row`. METHODS lists the methods with their parameters, `wire.RESULTS` what each ends with. Owns the format of
the lines; refuses lines over 64 MiB and parameters of a wrong type.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, get_args

from ..errors import QchatError, UsageError
from ..machine.files import parse_json_value
from ..quoting import printable, quote_value

PROTOCOL_VERSION = 1
MAX_LINE_NBYTES = 64 << 20
# names the front end's process id, if the front end is not the engine's parent
FRONT_END_VARIABLE = "QCHAT_FRONT"

# the type of each parameter; a parameter that may be None is optional
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
        "image_tokens": int | None,
        "conversation": int | None,
        "store": str | None,
    },
    "unload": {},
    "send": {"text": str, "images": list | None, **_SETTINGS},
    "retry": _SETTINGS,
    "edit": {"turn": int, "text": str, "images": list | None, **_SETTINGS},
    "answer_tools": {"results": list, **_SETTINGS},
    "undo": {},
    "fork": {"turn": int},
    "switch": {"number": int},
    "reset": {},
    "prime": {"messages": list},
    "set_system": {"text": str | None},
    "set_tools": {"tools": list},
    "history": {"mode": str},
    "open": {"conversation": int},
    "rename": {"title": str},
    "state": {},
    "explain": {},
    "prompt": {"text": str | None, **_SETTINGS},
    "replies": {},
    # the probability of each id of a reply, with the `count` likeliest in its place
    "score": {"turn": int, "count": int | None},
    "count": {"text": str},
    # a whole conversation, or a raw prompt as text or ids, on the loaded model beside its session
    "complete": {
        "messages": list | None,
        "prompt": str | list | None,
        "tools": list | None,
        "forced_call": str | None,
        "strict_tools": list | None,
        "parallel_calls": bool | None,
        "constraint": dict | None,
        **_SETTINGS,
    },
    "count_messages": {"messages": list, "tools": list | None, **_SETTINGS},
    "memory": {},
    "save_state": {},
    "shutdown": {},
}
# served at once, even while another method runs
URGENT_METHODS: Mapping[str, Parameters] = {"cancel": {"id": int}, "close_thought": {}}
# bits under a budget: the fields of `allocation.Budget`, the file of sensitivities, the text to measure them,
# which rounding with compensation reads too
_ALLOCATION = {"budget": dict | None, "sensitivity": str | None, "calibration": str | None}
JOB_METHODS: Mapping[str, Parameters] = {
    "convert": {
        "source": str,
        "target": str,
        "options": dict | None,
        "imatrix": str | None,
        "awq": str | None,
        "rounding": str | None,
        "dequantize": bool | None,
        "force": bool | None,
        "flags": list | None,
        **_ALLOCATION,
    },
    "calibrate": {
        "model": str,
        "output": str,
        "data": str | None,
        "chunk_size": int | None,
        "chunks": int | None,
    },
    "eval": {
        "models": list,
        "reference": str | None,
        "data": str | None,
        "context": int | None,
        "flips": int | None,
        "measurements": str | None,
    },
    "bench": {
        "models": list,
        "random": str | None,
        "variant": str | None,
        "runs": int | None,
        "against": str | None,
        "measurements": str | None,
    },
    "compare": {"models": list, "text": str, "system": str | None, **_SETTINGS},
    "inspect": {"model": str, "tensors": bool | None},
    "plan": {
        "source": str,
        "options": dict | None,
        "bandwidth": float | int | None,
        "measure": bool | None,
        **_ALLOCATION,
    },
    "memory_plan": {
        "model": str,
        "context": int | None,
        "kv_bits": int | None,
        "image_tokens": int | None,
    },
    "fetch": {"id": str, "revision": str | None},
}
METHODS: Mapping[str, Parameters] = {**CHAT_METHODS, **URGENT_METHODS, **JOB_METHODS}


class Cancelled(QchatError):
    """The error of a cancelled call; a cancelled reply ends with a `Done` instead."""

    exit_code = 130


@dataclass(frozen=True)
class Request:
    """One call; `params` has every parameter of the method, None for those not given."""

    id: int
    method: str
    params: Mapping[str, Any]

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> "Request":
        """Check and convert a decoded line. Raises UsageError for an invalid request."""
        number, method, params = message.get("id"), message.get("method"), message.get("params", {})
        if not _has_type(number, int) or not isinstance(method, str) or not isinstance(params, dict):
            raise UsageError("the line is not a request, wanted an object with id, method and params")
        if method not in METHODS:
            raise UsageError(f"unknown method {quote_value(method)}")
        return cls(number, method, _check_params(method, params))  # pyright: ignore[reportArgumentType]


def _check_params(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    wanted = METHODS[method]
    if unknown := sorted(params.keys() - wanted.keys()):
        raise UsageError(
            f"{method} has no parameter {quote_value(unknown[0])}, wanted {', '.join(wanted) or 'none'}"
        )
    for name, kind in wanted.items():
        if not _has_type(params.get(name), kind):
            found = "missing" if name not in params else f"{quote_value(params[name])}"
            raise UsageError(f"{method}: the parameter {name} is {found}, wanted {_type_name(kind)}")
    return {name: params.get(name) for name in wanted}


def _has_type(value: object, kind: Any) -> bool:
    """Compare exact types, because True is an int in Python."""
    return type(value) in (get_args(kind) or (kind,))


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def encode(message: Mapping[str, Any]) -> bytes:
    """Return the message as one line of ASCII, which can be split at any byte.

    Dataclasses in it become objects; NaN and infinity, which JSON lacks, become null.
    """
    try:
        line = json.dumps(message, separators=(",", ":"), allow_nan=False, default=_fields)
    except ValueError:
        return encode(_replace_nan(message))
    return line.encode() + b"\n"


def _fields(value: object) -> dict[str, Any]:
    """Return the fields of a dataclass; does not copy what is in them, as the slower `asdict` does."""
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return vars(value)


def _replace_nan(value: Any) -> Any:
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {name: _replace_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line. Raises UsageError for anything else."""
    if len(line) > MAX_LINE_NBYTES:
        raise UsageError(f"the line is longer than {MAX_LINE_NBYTES >> 20} MiB")
    try:
        message = parse_json_value(line.decode())
    except ValueError as problem:
        raise UsageError(f"the line is not JSON: {printable(str(problem))}") from problem
    if not isinstance(message, dict):
        raise UsageError("the line is not a JSON object")
    return message


@dataclass(frozen=True)
class Failure:
    """An error as it goes over the pipe; `kind` is the name of its class."""

    kind: str
    message: str
    exit_code: int


def error_message(error: QchatError, number: int | None) -> dict[str, Any]:
    """Return the message that ends call `number` with `error`; without a number it belongs to no call."""
    return {"id": number, "error": Failure(type(error).__name__, str(error), error.exit_code)}
