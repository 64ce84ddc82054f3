"""Tool calls written as tags: `<function=NAME><parameter=NAME>value</parameter></function>`.

Owns the tags and the tolerance of their spelling, and where a value ends: never at a tag inside it.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .argument_types import ArgumentType
from .json_calls import read_arguments
from .loose_json import Unfinished, read_loosely

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BLANK = "[ \t]{0,20}"
IS = rf"(?:{BLANK}[=:]|[ \t]{{1,20}}name{BLANK}=)"
NAME = r"[^<>\n]{1,200}"
BEGIN_CALL = rf"<{BLANK}tool_call{BLANK}>"
END_CALL = rf"<{BLANK}/{BLANK}tool_call{BLANK}>"
# without its `>` a tag ends before the next one, and a parameter's with its line
BEGIN_FUNCTION = rf"<{BLANK}function{IS}({NAME})(?:>|(?=\s*<{BLANK}param))"
BEGIN_PARAMETER = rf"<{BLANK}param(?:eter)?{IS}({NAME})(?:>|(?=\n))"
END_PARAMETER = rf"<{BLANK}/{BLANK}param(?:eter)?(?:{BLANK}={NAME})?{BLANK}(?:>|(?=\s*<))"
END_FUNCTION = rf"<{BLANK}/{BLANK}function(?:{BLANK}={NAME})?{BLANK}(?:>|(?=\s*<)|\Z)"


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


FUNCTION = _pattern(rf"\s*{BEGIN_FUNCTION}")
PARAMETER = _pattern(rf"\s*{BEGIN_PARAMETER}\n?")
FUNCTION_END = _pattern(rf"\s*{END_FUNCTION}")
CALL_END = _pattern(rf"\s*(?:{END_CALL}|\Z)")
# words in place of parameters, on lines of their own
WORDS = _pattern(rf"[ \t]*\n[^<`]*\n{END_FUNCTION}(?=\s*{END_CALL})")
MARK = _pattern(
    rf"(?P<end>\n?{END_PARAMETER})|\n(?P<next>{BEGIN_PARAMETER})"
    rf"|(?P<inner><function={NAME}>(?=\s*<parameter=))|(?P<close>\n?{END_FUNCTION})"
)
# what makes `</parameter>` the end of a value rather than a part of it
AFTER_VALUE = _pattern(
    rf"\s*(?:{BEGIN_PARAMETER}|{BEGIN_FUNCTION}|{END_CALL}|\Z"
    rf"|{END_FUNCTION}\s*(?:<{BLANK}function{IS}|{END_CALL}|\Z))"
)
AFTER_VALUE_LENIENT = _pattern(rf"\s*(?:{BEGIN_PARAMETER}|{BEGIN_FUNCTION}|{END_FUNCTION}|{END_CALL}|\Z)")
# what follows a function whose last value lacks its closing tag
AFTER_OPEN_VALUE = _pattern(rf"\s*(?:{END_CALL}\s*(?:{BEGIN_CALL}|\Z)|{BEGIN_FUNCTION}|\Z)")
CLOSERS = _pattern(rf"\n?(?:{END_PARAMETER})?\s*(?:{END_FUNCTION})?\s*(?:{END_CALL})?\s*\Z")
CLOSER = _pattern(END_PARAMETER)
LAST_CLOSER = _pattern(rf"\s*{END_PARAMETER}\s*\Z")
TAG = _pattern(r"</?tool_call>|</?function|</?parameter")
QUOTE = re.compile(r'\\.|"', re.DOTALL)
FENCE = re.compile(r"\s*(?:```\w*\s*)?")


@dataclass(frozen=True)
class Reading:
    """How tolerantly a call is read.

    `final` at the end of the reply; then also `unclosed` about values without closing tags, and `lenient`
    about what may follow a value. A call that is `bare` has no `<tool_call>`.
    """

    final: bool = False
    unclosed: bool = False
    lenient: bool = False
    bare: bool = False


class XmlCall(NamedTuple):
    """A call, and the place where its function ends."""

    name: str
    arguments: dict[str, Any]
    end: int


def read_xml_call(
    text: str, start: int, types: Mapping[str, Mapping[str, ArgumentType]], how: Reading
) -> XmlCall | None:
    """Return the call whose function begins at `start`; None if it is open, or words about a function."""
    head = FUNCTION.match(text, start)
    if head is None:
        return None
    name = match_name(clean_name(head[1]), types)
    known = types.get(name, {})
    try:
        found = _json_body(text, head.end(), known, how) or _parameters(text, head.end(), known, how)
    except Unfinished:
        return None
    return XmlCall(name, *found) if found else None


def clean_name(name: str) -> str:
    """Return the name in a tag, without quotes and what follows them."""
    quoted = re.match(r"\s*([\"'])(.+?)\1", name)
    return (quoted[2] if quoted else name.strip().strip("\"'")).removesuffix("/").strip()


def match_name(name: str, known: Collection[str]) -> str:
    """Return the known name that differs in case only, or the name itself."""
    if name in known:
        return name
    alike = [one for one in known if one.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else name


def _parameters(
    text: str, start: int, types: Mapping[str, ArgumentType], how: Reading
) -> tuple[dict[str, Any], int] | None:
    """Return the arguments of the function whose tag ends at `start`, and the place where it ends."""
    arguments: dict[str, Any] = {}
    while head := PARAMETER.match(text, start):
        parameter = match_name(clean_name(head[1]), types)
        others = set(types) - set(arguments) - {parameter} if types else None
        kind = types.get(parameter, ArgumentType())
        end = _end_of_value(text, head.end(), others, how, is_json=kind.is_container)
        if end is None:
            return None
        stop, start = end
        value = _without_spare_closers(text[head.end() : stop])
        arguments[parameter] = kind.parse(value.strip() if how.unclosed else value)
    if close := FUNCTION_END.match(text, start) or (not arguments and WORDS.match(text, start)):
        return arguments, close.end()
    if CALL_END.match(text, start):
        return (arguments, start) if arguments or text[start:].strip() else None
    return (arguments, start) if arguments and FUNCTION.match(text, start) else None


def _json_body(
    text: str, start: int, types: Mapping[str, ArgumentType], how: Reading
) -> tuple[dict[str, Any], int] | None:
    """Return the arguments that a function has as one JSON object, and the place where it ends.

    None without one. Raises Unfinished for one that is open.
    """
    place = FENCE.match(text, start).end()  # pyright: ignore[reportOptionalMemberAccess]
    if not text.startswith("{", place):
        return None
    try:
        value, end = read_loosely(text, place)
        arguments = read_arguments(value, types)
    except Unfinished:
        raise
    except ValueError:
        return None
    end = FENCE.match(text, end).end()  # pyright: ignore[reportOptionalMemberAccess]
    if close := FUNCTION_END.match(text, end):
        return arguments, close.end()
    return (arguments, end) if CALL_END.match(text, end) and (how.final or text[end:].strip()) else None


def _without_spare_closers(value: str) -> str:
    """Return a value without closing tags at its end that close nothing in it."""
    spare, end = value.count("</parameter") - value.count("<parameter"), len(value)
    while spare > 0 and (last := LAST_CLOSER.search(value, max(end - 80, 0), end)):
        spare, end = spare - 1, last.start()
    return value[:end]


def _end_of_value(
    text: str, start: int, others: set[str] | None, how: Reading, *, is_json: bool
) -> tuple[int, int] | None:
    """The end of the value that begins at `start`, and the place where the call continues; None if open.

    `others` are the parameters that may follow, None if they are unknown. A whole call inside the value is a
    part of it, and so is a tag inside a string where the value `is_json`.
    """
    after = AFTER_VALUE_LENIENT if how.lenient or how.bare else AFTER_VALUE
    strings, closers, inner = _Strings(text, start, is_json and not how.lenient), _Closers(text, after), 0
    for mark in MARK.finditer(text, start):
        if mark["inner"] and not how.lenient:
            inner += 1
        elif mark["close"]:
            if how.unclosed and not inner and AFTER_OPEN_VALUE.match(text, mark.end()):
                return mark.start(), mark.start()
            inner = max(inner - 1, 0)
        elif inner or strings.open_at(mark.start()):
            continue
        elif mark["end"] and after.match(text, mark.end()):
            return mark.span()
        elif mark["next"] and _is_known(mark, others) and (how.unclosed or closers.end_value(mark.end())):
            return mark.start(), mark.start()
    return _end_of_last_value(text, start) if how.final else None


def _is_known(mark: re.Match[str], others: set[str] | None) -> bool:
    """Whether a tag inside a value names one of the parameters that may follow."""
    head = PARAMETER.match(mark["next"])
    return others is None or (
        head is not None and match_name(clean_name(head[1]), dict.fromkeys(others)) in others
    )


def _end_of_last_value(text: str, start: int) -> tuple[int, int] | None:
    """Return the end of a value that lasts to the end of the reply, apart from closing tags."""
    closers = CLOSERS.search(text, max(start, len(text) - 200))
    stop = closers.start() if closers else len(text)
    return None if TAG.search(text, start, stop) else (stop, len(text))


class _Strings:
    """Tells whether a place is inside a string of the JSON that begins at `start`; places ascend."""

    def __init__(self, text: str, start: int, is_json: bool):
        self._marks = (
            QUOTE.finditer(text, start) if is_json and re.match(r"\s*[{\[]", text[start:]) else iter(())
        )
        self._next = next(self._marks, None)
        self._open = False

    def open_at(self, place: int) -> bool:
        while self._next and self._next.start() < place:
            self._open ^= self._next[0] == '"'
            self._next = next(self._marks, None)
        return self._open


class _Closers:
    """Finds the closing tags of parameters; places ascend."""

    def __init__(self, text: str, after: re.Pattern[str]):
        self._text, self._after = text, after
        self._marks = CLOSER.finditer(text)
        self._next = next(self._marks, None)

    def end_value(self, place: int) -> bool:
        """Whether the first closing tag from `place` on ends a value."""
        while self._next and self._next.start() < place:
            self._next = next(self._marks, None)
        return self._next is not None and self._after.match(self._text, self._next.end()) is not None
