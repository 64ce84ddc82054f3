"""Finds tool calls in streaming text: `<tool_call><function=NAME><parameter=NAME>...`, or JSON.

Owns the format and its tolerance: missing closing tags, a missing `<tool_call>` before a known function,
values over several lines, Python's True and None. Passes all other text through. Refuses nothing; a schema
decides only the type of a value.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..events import ToolUse
from ..machine.files import parse_json

Piece = str | ToolUse

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NAME = r"([^<>\n]{1,200})"
FUNCTION = re.compile(rf"\s*<function={NAME}>")
END_OF_FUNCTION = re.compile("</function>")
PARAMETER = re.compile(rf"\s*<parameter={NAME}>\n?")
# a closing tag ends a value only where a call can continue; else the next parameter or function's end does
END_OF_VALUE = re.compile(
    r"\n?</parameter>(?=\s*(?:<parameter=|</?function|\Z))"
    rf"|\n(?=<parameter={NAME}>)"
    r"|\n?(?=</function>\s*(?:<function=|\Z))"
    r"|\n?\Z"
)
LOOKAHEAD = 64  # characters after an opening tag within which a call must begin
PYTHON_WORDS = {"True": True, "False": False, "None": None}
PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
}


class ToolCallParser:
    """Splits the text of an answer into text and tool calls; all texts and `raw`s joined equal the input.

    Holds text back only while it may be the beginning of a call.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()):
        """`tools` are as the chat template takes them. Raises UsageError for one without a function name."""
        self._types = dict(map(_signature, tools))
        self._openers = (OPEN, *(f"<function={name}>" for name in self._types))
        self._opener = re.compile("|".join(map(re.escape, self._openers)))
        self._held = ""  # a possible beginning of an opener, or the open call so far
        self._searched = 0  # characters of the open call that were searched already; 0 outside a call

    def add(self, text: str) -> list[Piece]:
        """The pieces that `text` completes, in order."""
        self._held += text
        pieces: list[Piece] = []
        while self._close(pieces) if self._searched else self._open(pieces):
            pass
        return pieces

    @property
    def held(self) -> str:
        """Text that may still become a call."""
        return self._held

    def flush(self, *, cut: bool = False) -> list[Piece]:
        """The remaining pieces at the end of the reply.

        Reads an unfinished call as far as it goes. If the reply was `cut` it stays text: half a call must not
        run.
        """
        pieces: list[Piece] = []
        if self._searched and not cut:
            pieces = self._read(self._held)
        elif self._held:
            pieces = [self._held]
        self._held, self._searched = "", 0
        return pieces

    def _open(self, pieces: list[Piece]) -> bool:
        """Pass text on up to the beginning of a call; return whether there is one."""
        opener = self._opener.search(self._held)
        end = opener.start() if opener else len(self._held) - self._possible_opener()
        self._pass(end, pieces)
        self._searched = len(opener[0]) if opener else 0
        return opener is not None

    def _possible_opener(self) -> int:
        """The number of characters at the end that may begin an opening tag."""
        start = self._held.rfind("<")
        tail = self._held[start:] if start >= 0 else ""
        return len(tail) if any(opener.startswith(tail) for opener in self._openers) else 0

    def _close(self, pieces: list[Piece]) -> bool:
        """Read the open call if it has ended, or pass on its tag if no call follows; return if either."""
        if self._held.startswith(OPEN) and not _may_be_call(self._held[len(OPEN) : len(OPEN) + LOOKAHEAD]):
            self._pass(len(OPEN), pieces)
            self._searched = 0
            return True
        ends = [at for tag in (CLOSE, OPEN) if (at := self._held.find(tag, self._searched)) >= 0]
        if not ends:
            self._searched = max(self._searched, len(self._held) - len(CLOSE) + 1)
            return False
        end = min(ends)
        end += len(CLOSE) if self._held.startswith(CLOSE, end) else 0
        pieces += self._read(self._held[:end])
        self._held, self._searched = self._held[end:], 0
        return True

    def _pass(self, end: int, pieces: list[Piece]) -> None:
        if end:
            pieces.append(self._held[:end])
            self._held = self._held[end:]

    def _read(self, block: str) -> list[Piece]:
        """The calls in `block`, which includes its opening and closing tags, or its text if none."""
        inner = (len(OPEN) if block.startswith(OPEN) else 0, len(block.removesuffix(CLOSE)))
        head = FUNCTION.match(block, *inner)
        if head is None:
            return [_json_call(block, block[slice(*inner)])]
        pieces: list[Piece] = []
        start = 0
        while head:
            name = _strip_quotes(head[1])
            arguments, end = self._arguments(name, block, head.end(), inner[1])
            head = FUNCTION.match(block, end, inner[1])
            if not head and (len(block) > inner[1] or not block[end:].strip()):
                end = len(block)
            pieces.append(ToolUse(name, arguments, block[start:end]))
            start = end
        return [*pieces, block[start:]] if block[start:] else pieces

    def _arguments(self, name: str, block: str, start: int, end: int) -> tuple[dict[str, Any], int]:
        """The arguments of the function whose tag ends at `start`, and the place where the function ends."""
        types = self._types.get(name, {})
        arguments: dict[str, Any] = {}
        while head := PARAMETER.match(block, start, end):
            close = END_OF_VALUE.search(block, head.end(), end)
            stop, start = close.span() if close else (end, end)
            parameter = _strip_quotes(head[1])
            arguments[parameter] = _parse_value(block[head.end() : stop], types.get(parameter, frozenset()))
        if FUNCTION.match(block, start, end):
            return arguments, start
        close = END_OF_FUNCTION.search(block, start, end)
        return arguments, close.end() if close else end


def _may_be_call(text: str) -> bool:
    """Whether `text`, which follows an opening tag, can be the beginning of a call."""
    text = text.lstrip()
    return text.startswith(("<function=", "{")) or "<function=".startswith(text)


def _json_call(block: str, text: str) -> Piece:
    """The call in the older form `{"name": ..., "arguments": {...}}`, or the block itself if none."""
    try:
        call = parse_json(text, "a tool call", ValueError)
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = parse_json(arguments, "its arguments", ValueError)
    except ValueError:
        return block
    name = call.get("name")
    return ToolUse(name, arguments, block) if isinstance(name, str) and isinstance(arguments, dict) else block


def _strip_quotes(name: str) -> str:
    return name.strip().strip("\"'")


def _parse_value(text: str, types: frozenset[str]) -> Any:
    """`text` as a value of one of these JSON types, or the text itself if it is none."""
    if not types or "string" in types:
        return text
    try:
        word = text.strip()
        value = PYTHON_WORDS[word] if word in PYTHON_WORDS else json.loads(word)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    if "integer" in types and isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if any(_has_type(value, name) for name in types) else text


def _has_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, PYTHON_TYPES.get(name, ()))


def _signature(tool: Mapping[str, Any]) -> tuple[str, dict[str, frozenset[str]]]:
    """A tool's name and the JSON types of its parameters."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise UsageError(f"a tool must be an object that names its function, found {tool!r:.80}")
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    named = properties.items() if isinstance(properties, Mapping) else ()
    return name, {parameter: _types(schema) for parameter, schema in named}


def _types(schema: Any) -> frozenset[str]:
    """The JSON types that `schema` allows; empty if it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    own = schema.get("type", ())
    named = [own] if isinstance(own, str) else own if isinstance(own, list | tuple) else []
    options = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    return frozenset(word for word in named if isinstance(word, str)).union(*map(_types, options))
