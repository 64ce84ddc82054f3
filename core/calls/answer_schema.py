"""The JSON schema of an answer: read from a file, and checked by llguidance before any model is loaded."""

import re
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..machine.files import read_json
from .json_grammar import json_rule

MAX_FILE_NBYTES = 4 << 20
MISSING = "constrained replies need llguidance: install qchat with the extra `structured`"
# llguidance ignores keys that are no keywords: a sample document would be a schema that anything satisfies
RESTRICTING = {
    *("type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf"),
    *("format", "pattern", "minLength", "maxLength"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("properties", "patternProperties", "additionalProperties", "required"),
    *("minProperties", "maxProperties"),
    *("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
}


def read_schema(path: str | Path) -> dict[str, Any]:
    """Return the schema in the JSON file `path`.

    Raises UsageError for a file that cannot be read, holds no schema, or one that cannot be promised.
    """
    schema = read_json(Path(path), UsageError, MAX_FILE_NBYTES)
    check_grammar(f"start: document\ndocument: {json_rule(schema)}")
    if schema and not schema.keys() & RESTRICTING:
        raise UsageError(f"{path} is not a JSON schema: it has no keyword that restricts an answer")
    return schema


def require_llguidance() -> None:
    """Raise UsageError where the extra `structured` is not installed."""
    try:
        import llguidance  # noqa: F401 (half of the users never constrain a reply)
    except ImportError as problem:
        raise UsageError(MISSING) from problem


def check_grammar(grammar: str) -> None:
    """Raise UsageError for a grammar that cannot be used."""
    require_llguidance()
    from llguidance import LLMatcher

    if problem := LLMatcher.validate_grammar(grammar):
        raise UsageError(f"the reply cannot be constrained: {matcher_error(problem)}")


def matcher_error(problem: str) -> str:
    """Return llguidance's words without places in the grammar, which the user never sees."""
    words = re.split(r"\n\s+1 \| ", problem)[0]
    return " ".join(re.sub(r"^(at )?\d+\(\d+\): ", "", words).split())
