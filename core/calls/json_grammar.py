"""JSON schemas in llguidance's grammars: bounded white space, and no schema that only endless documents fit.

Knows no tool and no template. llguidance itself refuses the schemas that contradict themselves.
"""

import json
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from .argument_types import resolve_reference

Schema = Mapping[str, Any] | bool
# one space, or the beginning of an indented line: without a bound white space could go on until the limit
WHITE_SPACE = r"[ ]?|\r?\n[ \t]{0,32}"
MAX_SCHEMA = 1 << 20  # characters
MAX_PASSES = 32
# keywords whose values are no schemas
VALUES = ("enum", "const", "default", "examples")
DEFINITIONS = ("$defs", "definitions")


def json_rule(schema: Schema, root: Schema | None = None) -> str:
    """Return the right side of a Lark rule for JSON that satisfies `schema`; references lead into `root`.

    Raises UsageError for a schema that no document satisfies because it needs itself, or that is too large.
    """
    if isinstance(schema, bool):
        whole: dict[str, Any] = {} if schema else {"enum": []}
    else:
        whole = dict(schema)
    if isinstance(root, Mapping) and root is not schema:
        whole = {name: root[name] for name in DEFINITIONS if name in root} | whole
    try:
        whole = _close_gaps(whole)
    except RecursionError as problem:
        raise UsageError("the schema nests too deeply") from problem
    whole["x-guidance"] = {"whitespace_pattern": WHITE_SPACE}
    try:
        written = json.dumps(whole, allow_nan=False)
        endless = not Endings(whole).has_end(whole)
    except (ValueError, TypeError, RecursionError) as problem:
        raise UsageError("the schema is not JSON, or nests too deeply") from problem
    if len(written) > MAX_SCHEMA:
        raise UsageError(f"the schema has {len(written):,} characters, more than {MAX_SCHEMA:,}")
    if endless:
        raise UsageError("no document can satisfy the schema: it requires itself without end")
    return f"%json {written}"


def _close_gaps(schema: Any) -> Any:
    """Return a schema in which exclusive bounds less than 1 apart are inclusive, and a little closer.

    llguidance lets the bound itself pass there: -2 where -2.5 < x < -2.
    """
    if isinstance(schema, list):
        return [_close_gaps(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: value if name in VALUES else _close_gaps(value) for name, value in schema.items()}
    lows = [found[name] for name in ("minimum", "exclusiveMinimum") if _is_number(found.get(name))]
    highs = [found[name] for name in ("maximum", "exclusiveMaximum") if _is_number(found.get(name))]
    gap = min(highs) - max(lows) if lows and highs else 1
    if found.get("type") == "integer" or not 0 < gap < 1:
        return found
    lowest, highest = max(lows), min(highs)
    if found.pop("exclusiveMinimum", None) == lowest:
        lowest += gap / 1024
    if found.pop("exclusiveMaximum", None) == highest:
        highest -= gap / 1024
    found |= {"minimum": lowest, "maximum": highest}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Endings:
    """Tells which schemas some finite document may fit, as far as references decide it."""

    def __init__(self, root: Mapping[str, Any]):
        self._root = root
        self._ending: set[str] = set()  # references that are known to lead to an end
        self._seen: set[str] = set()  # references looked at in this pass

    def has_end(self, schema: Any) -> bool:
        """Return whether a finite document may satisfy `schema`."""
        for _ in range(MAX_PASSES):
            known = len(self._ending)
            self._seen.clear()
            if self._ends(schema):
                return True
            if len(self._ending) == known:
                return False
        return False

    def _ends(self, schema: Any) -> bool:
        if not isinstance(schema, Mapping):
            return True
        parts = schema.get("anyOf") or schema.get("oneOf")
        return (
            self._reference_ends(schema.get("$ref"))
            and (not isinstance(parts, list) or any(map(self._ends, parts)))
            and all(map(self._ends, _list(schema.get("allOf"))))
            and all(map(self._ends, _needed(schema)))
        )

    def _reference_ends(self, reference: Any) -> bool:
        if not isinstance(reference, str) or reference in self._ending:
            return True
        if reference in self._seen:
            return False
        self._seen.add(reference)
        if self._ends(resolve_reference(reference, self._root)):
            self._ending.add(reference)
        return reference in self._ending


def _needed(schema: Mapping[str, Any]) -> list[Any]:
    """Return the schemas of the parts that every document of `schema` has."""
    properties, items = schema.get("properties"), schema.get("items")
    if schema.get("type") == "object" and isinstance(properties, Mapping):
        return [properties.get(name) for name in _list(schema.get("required")) if isinstance(name, str)]
    least = schema.get("minItems")
    if schema.get("type") == "array" and isinstance(least, int) and least > 0:
        first = _list(schema.get("prefixItems"))[:least]
        return [*first, items] if least > len(first) else first
    return []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
