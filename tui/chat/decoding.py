"""What an engine writes, as the frozen values of `core`: checked and decoded once, where the pipe is read.

Raises ValueError, with what is wrong and where, for a value that is not of its type. Events and results of
jobs stay plain objects.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ...core.events import EVENTS, Announcement, CallEvent
from ...core.worker.protocol import JOB_METHODS
from ...core.worker.wire import RESULTS

Value = TypeVar("Value")
Batch = list[CallEvent]


def decode_events(method: str, events: Sequence[Any]) -> list[Any]:
    """Return a batch of events of a call."""
    return list(events) if method in JOB_METHODS else [decode_event(event) for event in events]


def decode_event(fields: Any) -> CallEvent | Announcement:
    """Return an event of the kind that its field `event` names."""
    name = fields.get("event") if isinstance(fields, Mapping) else None
    kind = EVENTS.get(str(name))
    if kind is None:
        raise ValueError(f"there is no event {name!r:.40}")
    return decode_value(fields, kind, f"event {name}")


def decode_result(method: str, result: Any) -> Any:
    """Return the result of a call; `RESULTS` has its type."""
    return decode_value(result, RESULTS[method], f"result of {method}")


def decode_value(value: Any, kind: type[Value], what: str) -> Value:
    """Return `value` as a `kind`; `what` names it in an error."""
    from msgspec import ValidationError, convert  # imported while the engine is starting

    try:
        return convert(value, kind)
    except ValidationError as error:
        raise ValueError(f"{what}: {error}") from error
