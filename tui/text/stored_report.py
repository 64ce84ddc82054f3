"""Reports as plain JSON values, to be stored with a conversation, and back.

Refuses nothing: parts of an unknown kind are left out, and figures that JSON lacks are 0.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .diff import Diff
from .report import Bars, Gauge, Lines, Markdown, Part, Plot, Report, Spark, Table, report_text
from .trend import Trend

KINDS: dict[str, type[Part]] = {
    kind.__name__: kind for kind in (Table, Bars, Spark, Plot, Trend, Diff, Gauge, Lines, Markdown)
}
MAX_CHARACTERS = 50_000  # of a report that is stored as text, because its parts are too large
MAX_VALUES = 5_000


def encode_parts(report: Report) -> list[dict[str, Any]]:
    """Return the parts of a report as values for JSON; a huge one becomes the beginning of its text."""
    parts = [{"kind": type(part).__name__, **asdict(part)} for part in report.parts]
    text = report_text(report)
    if len(text) > MAX_CHARACTERS or _count(parts) > MAX_VALUES:
        lines = [*text[:MAX_CHARACTERS].split("\n"), "… the rest was too long to be kept"]
        parts = [{"kind": "Lines", **asdict(Lines(lines))}]
    return _finite(parts)


def decode_parts(title: str, parts: Sequence[Any]) -> Report:
    """Return the report that `encode_parts` encoded."""
    return Report(title, [part for value in parts if (part := _decode(value)) is not None])


def _decode(value: Any) -> Part | None:
    import msgspec

    kind = KINDS.get(str(value.get("kind"))) if isinstance(value, dict) else None
    if kind is None:
        return None
    try:
        return msgspec.convert({name: one for name, one in value.items() if name != "kind"}, kind)
    except msgspec.ValidationError:
        return None


def _count(value: Any) -> int:
    """Return how many values there are in lists and objects."""
    if isinstance(value, dict):
        return sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, list | tuple) else 1


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return 0.0 if isinstance(value, float) and not math.isfinite(value) else value
