"""Values of tool arguments: written as text by the model, read as what the tool's JSON schema allows.

Reads JSON, also with faults, and Python literals. Follows references within the schema. A text that fits no
allowed type stays text, and so does every value whose schema does not say.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .loose_json import read_loosely

MAX_DEPTH = 16  # of references and combinations
MAX_LITERAL = 100_000  # characters of a Python literal; JSON may be longer
WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
}
# names that schemas use although JSON Schema does not know them
ALIASES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object"}
ALIASES |= {"list": "array", "none": "null"}


@dataclass(frozen=True)
class ArgumentType:
    """The JSON types that an argument may have, and its possible values where they are listed.

    None for either means that the schema does not say.
    """

    types: frozenset[str] | None = None
    values: tuple[Any, ...] | None = None

    @property
    def is_container(self) -> bool:
        """Whether the value can only be an object, an array or no text at all."""
        types = self.types or frozenset()
        return "string" not in types and bool(types & {"object", "array"})

    def parse(self, text: str) -> Any:
        """Return the value that `text` stands for, or the text itself."""
        if self.values is not None:
            return self._listed(text)
        types = self.types or frozenset()
        if types <= {"string"}:
            return text
        value = _read(text)
        if value is text and self.is_container:
            value = _read_loosely(text)
        if "string" in types and not (value is None or isinstance(value, dict | list)):
            return text  # 7 may be meant as a string
        return _fitted(value, types, text)

    def _listed(self, text: str) -> Any:
        """Return the possible value that `text` stands for: a string as it is, any other as its JSON."""
        words, value = text.strip(), _read(text)
        for possible in self.values or ():
            if isinstance(possible, str) and possible in (text, words):
                return possible
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        same = [p for p in self.values or () if p == value and isinstance(p, bool) == isinstance(value, bool)]
        return same[0] if same else text


def argument_types(parameters: Any) -> dict[str, ArgumentType]:
    """Return the type of each parameter by name; `parameters` is a tool's JSON schema, possibly none."""
    schemas = _properties(parameters, parameters, 0)
    return {name: _type_of(schema, parameters, 0) for name, schema in schemas.items()}


def _properties(schema: Any, root: Any, depth: int) -> dict[str, Any]:
    """Return the schemas of an object's properties, those of its parts included."""
    schema = _resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return {}
    found: dict[str, Any] = {}
    for part in (p for word in ("allOf", "anyOf", "oneOf") for p in _parts(schema, word)):
        found |= _properties(part, root, depth + 1)
    own = schema.get("properties")
    return found | dict(own) if isinstance(own, Mapping) else found


def _type_of(schema: Any, root: Any, depth: int) -> ArgumentType:
    schema = _resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return ArgumentType()
    wanted = [_own_type(schema)]
    wanted += [_type_of(part, root, depth + 1) for part in _parts(schema, "allOf")]
    for word in ("anyOf", "oneOf"):
        if parts := _parts(schema, word):
            wanted.append(_any_of([_type_of(part, root, depth + 1) for part in parts]))
    found = _all_of(wanted)
    if schema.get("nullable") is True:
        return _any_of([found, ArgumentType(frozenset({"null"}))])
    return found


def _own_type(schema: Mapping[str, Any]) -> ArgumentType:
    """Return what a schema says without its parts."""
    if "const" in schema:
        return ArgumentType(None, (schema["const"],))
    if isinstance(listed := schema.get("enum"), list | tuple):
        return ArgumentType(None, tuple(listed))
    named = schema.get("type")
    if named is None:
        named = [kind for word, kind in (("properties", "object"), ("items", "array")) if word in schema]
    words = [named] if isinstance(named, str) else named if isinstance(named, list | tuple) else []
    types = frozenset(_canonical(word) for word in words if isinstance(word, str))
    return ArgumentType(types or None)


def _any_of(parts: list[ArgumentType]) -> ArgumentType:
    """Return the union; a part that does not say allows what the others name."""
    if all(part.values is not None for part in parts):
        return ArgumentType(None, tuple(value for part in parts for value in part.values or ()))
    if all(part.values is not None or part.types == {"null"} for part in parts):
        return ArgumentType(None, (*(v for part in parts for v in part.values or ()), None))
    return ArgumentType(frozenset().union(*(_kinds(part) for part in parts)) or None)


def _all_of(parts: list[ArgumentType]) -> ArgumentType:
    """Return the intersection; a part that does not say does not count."""
    listed = next((part for part in parts if part.values is not None), None)
    if listed:
        return listed
    types = [part.types for part in parts if part.types]
    return ArgumentType(types[0].intersection(*types[1:]) or types[0]) if types else ArgumentType()


def _kinds(part: ArgumentType) -> frozenset[str]:
    """Return the types of a part, or of its possible values."""
    if part.values is None:
        return part.types or frozenset()
    return frozenset(name for name in PYTHON_TYPES for value in part.values if _has_type(value, name))


def _resolved(schema: Any, root: Any) -> Any:
    """Return the schema that a chain of references within `root` leads to, or None if it leads nowhere."""
    for _ in range(MAX_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if reference is None:
            return schema
        target = resolve_reference(reference, root)
        others = {name: value for name, value in schema.items() if name != "$ref"}
        schema = {**target, **others} if isinstance(target, Mapping) else others
    return None


def resolve_reference(reference: Any, root: Any) -> Any:
    """Return the schema that one reference within `root` names, or None."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    place = root
    for name in filter(None, reference[1:].split("/")):
        place = place.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
    return place


def _parts(schema: Mapping[str, Any], word: str) -> Iterable[Any]:
    parts = schema.get(word)
    return parts if isinstance(parts, list | tuple) else ()


def _canonical(word: str) -> str:
    return ALIASES.get(word.lower(), word.lower())


def _read(text: str) -> Any:
    """Return the JSON or Python value written in `text`, or the text itself."""
    text_value = text.strip()
    try:
        value = WORDS[text_value] if text_value in WORDS else json.loads(text_value)
        json.dumps(value, allow_nan=False)
        return value
    except (ValueError, RecursionError):
        pass
    if not text_value.startswith(("{", "[", "(")) or len(text_value) > MAX_LITERAL:
        return text
    try:
        tree = _JsonWords().visit(ast.parse(text_value, mode="eval"))
        return json.loads(json.dumps(ast.literal_eval(tree), allow_nan=False))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _read_loosely(text: str) -> Any:
    """Return the faulty JSON written in `text`, or the text itself."""
    words = text.strip()
    try:
        value, end = read_loosely(words)
    except ValueError:
        return text
    return value if end == len(words) else text


class _JsonWords(ast.NodeTransformer):
    """Reads true, false and null among Python literals."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(ast.Constant(WORDS[node.id]), node) if node.id in WORDS else node


def _fitted(value: Any, types: frozenset[str], text: str) -> Any:
    if "integer" in types and isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if any(_has_type(value, name) for name in types) else text


def _has_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, PYTHON_TYPES.get(name, ()))
