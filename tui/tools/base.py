"""What a tool is, and the bounds that hold for each: arguments that fit, results of limited length.

A result is data. Escape sequences and other control characters are removed; what looks like a special token
of the model stays text, because the engine encodes it so.
"""

import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...core.errors import QchatError
from ...core.quoting import quote_value, shorten
from ..text.sanitise import printable

# titles, clipboards and other strings for a terminal
TERMINAL_STRING = re.compile(r"\x1b[\]PX^_][^\x07\x1b]{0,4096}(?:\x07|\x1b\\)?")
MAX_RESULT = 24_000  # characters of a result, about a quarter as many tokens
LEAST_RESULT = 200
# what the model may do without a question, what it may do once the user agreed, what is asked each time
Asking = Literal["never", "until allowed", "always"]
JSON_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


class ToolError(QchatError):
    """A call that failed, in one sentence for the model."""


@dataclass(frozen=True)
class Tool:
    """A tool as the model sees it, and the coroutine that runs it.

    `key` is what consent is remembered under; it names the program behind the tool, so that another one of
    the same name is asked about again. `owner` is the name of its server, empty for a tool of qchat's own.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[[Mapping[str, Any]], Coroutine[Any, Any, str]]
    asks: Asking = "until allowed"
    key: str = ""
    owner: str = ""

    def schema(self) -> dict[str, Any]:
        """Return the tool in the form of chat templates."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def check_arguments(parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise ToolError for arguments that a flat schema of ours does not allow."""
    properties, required = parameters["properties"], parameters.get("required", ())
    for name in required:
        if name not in arguments:
            raise ToolError(f"the argument {name} is missing")
    for name, value in arguments.items():
        if name not in properties:
            raise ToolError(f"there is no argument {quote_value(name)}, only {', '.join(properties)}")
        wanted = properties[name]["type"]
        is_flag = isinstance(value, bool)
        if not isinstance(value, JSON_TYPES[wanted]) or is_flag != (wanted == "boolean"):
            raise ToolError(f"the argument {name} is {quote_value(value)}, wanted a value of type {wanted}")


def bound_result(text: str, characters: int = MAX_RESULT) -> str:
    """Return printable text of about so many characters: a long one loses its middle, and says so."""
    text = printable(TERMINAL_STRING.sub("", text)).strip()
    if len(text) <= characters:
        return text or "(no output)"
    head = characters * 2 // 3
    tail = characters - head
    left_out = len(text) - characters
    return f"{text[:head]}\n\n[{left_out:,} characters are left out here]\n\n{text[-tail:]}"


def one_line(text: str, characters: int) -> str:
    """Return untrusted text as one printable line of at most so many characters."""
    return shorten(" ".join(printable(text).split()), characters)
