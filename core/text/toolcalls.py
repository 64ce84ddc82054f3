"""Finds tool calls in streaming text: `<tool_call><function=NAME><parameter=NAME>...`, or JSON.

Owns the format and its tolerance: missing closing tags, a missing `<tool_call>` before a known function, and
values over several lines that may hold such tags. A call is read whole or stays text: words about a
call are none, and no value is cut at a tag inside it. A schema decides only the type of a value.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..events import ToolUse
from ..machine.files import parse_json
from .argument_types import ArgumentType, argument_types

Piece = str | ToolUse

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NAME = r"([^<>\n]{1,200})"
FUNCTION = re.compile(rf"\s*<function={NAME}>")
PARAMETER = re.compile(rf"\s*<parameter={NAME}>\n?")
END_OF_FUNCTION = re.compile(r"\s*</function>")
END_OF_CALL = re.compile(r"\s*(?:</tool_call>|\Z)")
# words in place of parameters, on lines of their own
WORDS = re.compile(r"[ \t]*\n[^<`]*\n</function>(?=\s*</tool_call>)")
# what may follow the tag of a function in a call; after anything else it is words about one
CONTINUATIONS = ("<parameter=", "</function>", CLOSE)
MARK = re.compile(
    rf"(?P<end>\n?</parameter>)|(?P<next>\n<parameter={NAME}>)"
    rf"|(?P<inner><function={NAME}>(?=\s*<parameter=))|</function>"
)
# what makes `</parameter>` the end of a value rather than a part of it
AFTER_VALUE = re.compile(
    rf"\s*(?:<parameter={NAME}>|<function={NAME}>|</tool_call>|\Z|</function>\s*(?:<function=|</tool_call>|\Z))"
)
AFTER_VALUE_LENIENT = re.compile(rf"\s*(?:<parameter={NAME}>|<function={NAME}>|</function>|</tool_call>|\Z)")
CLOSERS = re.compile(r"\n?(?:</parameter>)?\s*(?:</function>)?\s*(?:</tool_call>)?\s*\Z")
TAG = re.compile(r"</?tool_call>|</?function|</?parameter")
TOOL_CALL = re.compile(f"{OPEN}|{CLOSE}")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True)
class _Reading:
    """How tolerantly a block is read: `final` at the end of the reply, then also `lenient` about values."""

    final: bool = False
    lenient: bool = False


STRICT, FINAL, LENIENT = _Reading(), _Reading(final=True), _Reading(final=True, lenient=True)


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
        self._before = ""  # the last character of text; after a backtick an opener is quoted
        self._opened = ""  # the opener of the open call
        self._searched = 0  # characters of the open call that were searched for its end

    def add(self, text: str) -> list[Piece]:
        """The pieces that `text` completes, in order."""
        self._held += text
        pieces: list[Piece] = []
        while self._close(pieces) if self._opened else self._open(pieces):
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
        while self._opened and not cut:
            found = next(filter(None, (self._read(self._held, how) for how in (FINAL, LENIENT))), None)
            if found is None:  # no call: its tag is text, and what follows may hold another
                self._pass(len(self._opened), pieces)
                pieces += self.add("")
                continue
            pieces += found[:-1]
            self._before = self._held = self._opened = ""
            pieces += self.add(found[-1]) if isinstance(found[-1], str) else found[-1:]
        self._pass(len(self._held), pieces)
        return pieces

    def _open(self, pieces: list[Piece]) -> bool:
        """Pass text on up to the beginning of a call; return whether there is one."""
        opener = self._opener.search(self._held)
        end = opener.start() if opener else len(self._held) - self._possible_opener()
        self._pass(end, pieces)
        if opener:
            self._opened, self._searched = opener[0], len(opener[0])
        return opener is not None

    def _possible_opener(self) -> int:
        """The number of characters at the end that may begin an opening tag."""
        start = self._held.rfind("<")
        tail = self._held[start:] if start >= 0 else ""
        return len(tail) if any(opener.startswith(tail) for opener in self._openers) else 0

    def _close(self, pieces: list[Piece]) -> bool:
        """Read the open call if it has ended, or pass on its tag if no call follows; return if either."""
        quoted = self._before == "`"
        if quoted or not _may_be_call(self._held, self._opened):
            self._pass(len(self._opened), pieces)
            self._before = "`" if quoted else self._before  # a tag right after a quoted one is quoted too
            return True
        while mark := TOOL_CALL.search(self._held, self._searched):
            end = mark.end() if mark[0] == CLOSE else mark.start()
            self._searched = mark.end()
            if found := self._read(self._held[:end], STRICT):
                pieces += found
                self._before, self._held, self._opened = "", self._held[end:], ""
                return True
        self._searched = max(self._searched, len(self._held) - len(CLOSE) + 1)
        return False

    def _pass(self, end: int, pieces: list[Piece]) -> None:
        if end:
            pieces.append(self._held[:end])
            self._before, self._held = self._held[end - 1], self._held[end:]
        self._opened = ""

    def _read(self, block: str, how: _Reading) -> list[Piece] | None:
        """The calls in `block`, which begins with an opener, and the text after them; None if it is open.

        Text, unless a call can be read and `how` is final.
        """
        begin = len(OPEN) if block.startswith(OPEN) else 0
        if not FUNCTION.match(block, begin):
            return _json_call(block, begin, how)
        pieces: list[Piece] = []
        start, place = 0, begin
        while head := FUNCTION.match(block, place):
            name = _strip_quotes(head[1])
            found = self._arguments(name, block, head.end(), how)
            if found is None:
                return None
            arguments, place = found
            if closer := END_OF_CALL.match(block, place):
                place = closer.end()
            pieces.append(ToolUse(name, arguments, block[start:place]))
            start = place
        return [*pieces, block[start:]] if block[start:] else pieces

    def _arguments(
        self, name: str, block: str, start: int, how: _Reading
    ) -> tuple[dict[str, Any], int] | None:
        """The arguments of the function whose tag ends at `start`, and the place where the function ends.

        None if the function is open there, or its tag stands in a text about it.
        """
        types = self._types.get(name, {})
        arguments: dict[str, Any] = {}
        while head := PARAMETER.match(block, start):
            parameter = _strip_quotes(head[1])
            others = set(types) - set(arguments) - {parameter} if types else None
            kind = types.get(parameter, ArgumentType())
            end = _end_of_value(block, head.end(), others, how, is_json=kind.is_container)
            if end is None:
                return None
            stop, start = end
            arguments[parameter] = kind.parse(block[head.end() : stop])
        if close := END_OF_FUNCTION.match(block, start) or (not arguments and WORDS.match(block, start)):
            return arguments, close.end()
        rest = block[start:].lstrip()
        ends = rest.startswith(CLOSE) or bool(arguments and (not rest or rest.startswith("<function=")))
        return (arguments, start) if ends else None


def _may_be_call(held: str, opener: str) -> bool:
    """Whether `held`, which begins with `opener`, can be the beginning of a call."""
    text = held[len(opener) :]
    if opener == OPEN:
        if _may_begin(text, ("{",)):
            return True
        head = FUNCTION.match(text)
        if not head:
            return _may_begin(text, ("<function=",)) and not re.match(r"\s*<function=[^<>\n]*[<>\n]", text)
        text = text[head.end() :]
        if re.match(r"[ \t]*\n[^<`]*(?:\n<|\Z)", text):  # words, perhaps
            return True
    return _may_begin(text, CONTINUATIONS)


def _may_begin(text: str, beginnings: Sequence[str]) -> bool:
    """Whether `text` begins with one of `beginnings` after white space, or may do so when it continues."""
    text = text.lstrip()
    return any(text.startswith(one) or one.startswith(text) for one in beginnings)


def _end_of_value(
    block: str, start: int, others: set[str] | None, how: _Reading, *, is_json: bool
) -> tuple[int, int] | None:
    """The end of the value that begins at `start`, and the place where the call continues; None if open.

    `others` are the parameters that may follow, None if they are unknown. A whole call inside the value is a
    part of it, and so is a tag inside a string where the value `is_json`.
    """
    after = AFTER_VALUE_LENIENT if how.lenient or not block.startswith(OPEN) else AFTER_VALUE
    inner = 0
    for mark in MARK.finditer(block, start):
        if mark["inner"] and not how.lenient:
            inner += 1
        elif mark[0] == "</function>":
            inner = max(inner - 1, 0)
        elif inner or (is_json and not how.lenient and _leaves_string_open(block[start : mark.start()])):
            continue
        elif mark["end"] and after.match(block, mark.end()):
            return mark.span()
        elif mark["next"] and _is_next(block, mark, others, after):
            return mark.start(), mark.start()
    if not how.final:
        return None
    closers = CLOSERS.search(block, start)
    stop = closers.start() if closers else len(block)
    return None if TAG.search(block, start, stop) else (stop, len(block))


def _is_next(block: str, mark: re.Match[str], others: set[str] | None, after: re.Pattern[str]) -> bool:
    """Whether a tag at the beginning of a line is the next parameter, after a value that lacks its closer."""
    if others is not None and _strip_quotes(mark[3]) not in others:
        return False
    close = block.find("</parameter>", mark.end())
    return close >= 0 and after.match(block, close + len("</parameter>")) is not None


def _leaves_string_open(text: str) -> bool:
    """Whether `text`, the beginning of JSON, ends within a string."""
    return text.lstrip().startswith(("{", "[")) and '"' in STRING.sub("", text)


def _json_call(block: str, begin: int, how: _Reading) -> list[Piece] | None:
    """The call in the older form `{"name": ..., "arguments": {...}}`, or the block itself if none.

    None if the block ends within a string.
    """
    text = block[begin:].removesuffix(CLOSE)
    if not how.final and _leaves_string_open(text):
        return None
    try:
        call = parse_json(text, "a tool call", ValueError)
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = parse_json(arguments, "its arguments", ValueError)
    except ValueError:
        return None if how.final else [block]
    name = call.get("name")
    if isinstance(name, str) and isinstance(arguments, dict):
        return [ToolUse(name, arguments, block)]
    return None if how.final else [block]


def _strip_quotes(name: str) -> str:
    return name.strip().strip("\"'")


def _signature(tool: Mapping[str, Any]) -> tuple[str, dict[str, ArgumentType]]:
    """A tool's name and the types of its parameters."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise UsageError(f"a tool must be an object that names its function, found {tool!r:.80}")
    return name, argument_types(function.get("parameters"))
