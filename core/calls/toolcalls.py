"""Finds tool calls in streaming text: `<tool_call><function=NAME><parameter=NAME>...`, or JSON.

Owns when a call begins and ends in the stream; `xml_calls` and `json_calls` read it. A call is read whole or
stays text: words about a call are none. Takes time linear in the text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..events import ToolUse
from .argument_types import ArgumentType, argument_types
from .json_calls import read_json_calls
from .loose_json import Unfinished
from .openers import MAX_BEGINNING, MAX_TAG, Openers
from .xml_calls import (
    BEGIN_CALL,
    CALL_END,
    CLOSE,
    END_CALL,
    FUNCTION,
    Reading,
    read_xml_call,
)

Piece = str | ToolUse

STRICT = Reading()
AT_THE_END = (Reading(final=True), Reading(final=True, unclosed=True), Reading(final=True, lenient=True))
TAGGED = re.compile(BEGIN_CALL, re.IGNORECASE)
CALL_MARK = re.compile(f"{BEGIN_CALL}|(?P<close>{END_CALL})", re.IGNORECASE)
CLOSER = re.compile(END_CALL, re.IGNORECASE)
BRACE_MARK, FENCE_MARK = re.compile(r"(?P<close>\})"), re.compile(r"\s(?P<close>```)")
# what may follow a `<tool_call>`, and the tag of a function; after anything else it is words about one
BODIES = ("<function=", "<function:", "<functionname=", "{", "[", "```", '"name":', '"tool":')
CONTINUATIONS = ("<parameter", "<param=", "<paramname=", "</function", CLOSE, "{", "```json{", "```{")
# after so many readings that found a call open, it must have grown by an eighth before the next one
FREE_READINGS = 16
# characters that all readings may take, per character of the text and besides: more only nonsense takes
MAX_READ, MAX_READ_MORE = 32, 4_000_000


class ToolCallParser:
    """Splits the text of an answer into text and tool calls; all texts and `raw`s joined equal the input.

    Holds text back only while it may be the beginning of a call. `unread` counts what began as a call and
    stays text.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()):
        """`tools` are as the chat template takes them. Raises UsageError for one without a function name."""
        self._types = dict(map(_signature, tools))
        self._openers = Openers(tuple(self._types))
        self._held = ""  # a possible beginning of an opener, or the open call so far
        self._later: list[str] = []  # what follows it, and cannot end it
        self._before = ""  # the last character of text; after a backtick an opener is quoted
        self._at_start = True  # no words yet
        self._opened = ""  # the opener of the open call
        self._judged = False  # whether the open call can no longer turn out to be words
        self._searched = 0  # characters of the open call that were searched for its end
        self._readings = self._read_to = 0
        self._passed = self._spent = 0  # characters before the held ones, and those that readings took
        self.unread = 0

    def add(self, text: str) -> list[Piece]:
        """The pieces that `text` completes, in order."""
        if self._judged and not {">", "}", "`"}.intersection(text):
            self._later.append(text)
            return []
        self._held = "".join((self._held, *self._later, text))
        self._later.clear()
        pieces: list[Piece] = []
        while self._close(pieces) if self._opened else self._open(pieces):
            pass
        return pieces

    @property
    def held(self) -> str:
        """Text that may still become a call."""
        return "".join((self._held, *self._later))

    def flush(self, *, cut: bool = False) -> list[Piece]:
        """The remaining pieces at the end of the reply.

        Reads an unfinished call as far as it goes. If the reply was `cut` it stays text: half a call must not
        run.
        """
        self._held = self.held
        self._later.clear()
        pieces: list[Piece] = []
        while self._opened and not cut:
            found = self._read_at_the_end()
            if found is None:  # no call: its tag is text, and what follows may hold another
                self.unread += bool(self._held[len(self._opened) :].strip())
                self._pass(len(self._opened), pieces)
                pieces += self.add("")
                continue
            self._take(found, "", pieces)
            pieces += self.add("")
        self._pass(len(self._held), pieces)
        return pieces

    def _open(self, pieces: list[Piece]) -> bool:
        """Pass text on up to the beginning of a call; return whether there is one."""
        opener = self._openers.find(self._held, at_start=self._at_start)
        if opener:
            self._pass(opener.start(), pieces)
            self._opened, self._searched = opener[0], len(opener[0])
            self._readings = self._read_to = 0
            return True
        self._pass(len(self._held) - self._openers.possible(self._held, at_start=self._at_start), pieces)
        return False

    def _close(self, pieces: list[Piece]) -> bool:
        """Read the open call if it has ended, or pass on its tag if no call follows; return if either."""
        quoted = self._before == "`"
        if quoted or not (self._judged or self._judge()):
            self._pass(len(self._opened), pieces)
            self._before = "`" if quoted else self._before  # a tag right after a quoted one is quoted too
            return True
        marks = self._marks()
        while mark := marks.search(self._held, self._searched):
            end = mark.end() if mark["close"] else mark.start()
            self._searched = mark.end()
            if self._may_read(end) and (found := self._read(self._held[:end], STRICT)):
                self._take(found, self._held[end:], pieces)
                return True
        self._searched = max(self._searched, len(self._held) - MAX_TAG)
        return False

    def _judge(self) -> bool:
        """Whether the open call can be one by how it begins."""
        may_be = self._judged or _may_be_call(self._held[:MAX_BEGINNING], self._opened)
        self._judged = may_be and len(self._held) >= MAX_BEGINNING
        return may_be

    def _marks(self) -> re.Pattern[str]:
        """What may end the open call."""
        if self._opened.lstrip()[0] == "<":
            return CALL_MARK
        return BRACE_MARK if self._opened.lstrip()[0] == "{" else FENCE_MARK

    def _may_read(self, end: int) -> bool:
        """Whether to try to read the open call up to `end`."""
        self._readings += 1
        if self._readings > FREE_READINGS and 8 * end < 9 * self._read_to:
            return False
        self._read_to = end
        return self._may_spend(end)

    def _may_spend(self, characters: int) -> bool:
        self._spent += characters
        return self._spent <= MAX_READ_MORE + MAX_READ * (self._passed + characters)

    def _read_at_the_end(self) -> list[Piece] | None:
        readings = (self._read(self._held, how) for how in AT_THE_END if self._may_spend(len(self._held)))
        return next(filter(None, readings), None)

    def _take(self, found: list[Piece], rest: str, pieces: list[Piece]) -> None:
        """Pass on what was read of the open call; text after its last call is searched with the `rest`."""
        if isinstance(found[-1], str) and len(found) > 1:
            rest = str(found.pop()) + rest
        if isinstance(found[0], str):
            self.unread += 1
            self._at_start = False
        pieces += found
        self._passed += len(self._held) - len(rest)
        self._before, self._held, self._opened, self._judged = "", rest, "", False

    def _pass(self, end: int, pieces: list[Piece]) -> None:
        if end:
            pieces.append(self._held[:end])
            self._passed += end
            self._at_start = self._at_start and not self._held[:end].strip()
            self._before, self._held = self._held[end - 1], self._held[end:]
        self._opened, self._judged = "", False

    def _read(self, block: str, how: Reading) -> list[Piece] | None:
        """The calls in `block`, which begins with an opener, and the text after them; None if it is open.

        Text, unless a call can be read and `how` is final.
        """
        tag = TAGGED.match(block)
        begin = tag.end() if tag else 0
        if FUNCTION.match(block, begin):
            how = how if tag else Reading(how.final, how.unclosed, how.lenient, bare=True)
            return self._read_xml(block, begin, how)
        return self._read_json(block, begin, how)

    def _read_xml(self, block: str, begin: int, how: Reading) -> list[Piece] | None:
        pieces: list[Piece] = []
        start, place = 0, begin
        while FUNCTION.match(block, place):
            call = read_xml_call(block, place, self._types, how)
            if call is None:
                return None
            place = call.end
            if closer := CALL_END.match(block, place):
                place = closer.end()
            pieces.append(ToolUse(call.name, call.arguments, block[start:place]))
            start = place
        return [*pieces, block[start:]] if block[start:] else pieces

    def _read_json(self, block: str, begin: int, how: Reading) -> list[Piece] | None:
        try:
            calls = read_json_calls(block, begin, self._types, complete=begin == 0 and not how.final)
        except Unfinished:
            return None
        except ValueError:
            return None if how.final or not begin else [block]
        pieces: list[Piece] = []
        start = 0
        for number, call in enumerate(calls, 1):
            end = call.end if number < len(calls) else _end_of_block(block, call.end)
            pieces.append(ToolUse(call.name, call.arguments, block[start:end]))
            start = end
        return [*pieces, block[start:]] if block[start:] else pieces


def _end_of_block(block: str, place: int) -> int:
    """Return the end of a call whose last object ends at `place`, with words before the closing tag."""
    closer = CLOSER.search(block, place)
    return closer.end() if closer else place


def _may_be_call(beginning: str, opener: str) -> bool:
    """Whether `beginning`, which begins with `opener`, can be the beginning of a call."""
    text = beginning[len(opener) :]
    if opener.lstrip()[0] != "<":
        return True
    if TAGGED.match(opener):
        head = FUNCTION.match(text)
        if not head:
            return _may_begin(text, BODIES) and not _is_no_function(text)
        text = text[head.end() :]
        if re.match(r"[ \t]*\n[^<`]*(?:\n<|\Z)", text):  # words, perhaps
            return True
    return _may_begin(text, CONTINUATIONS)


def _is_no_function(text: str) -> bool:
    """Whether a tag that begins like a function's has ended, or another one begun, and it is none."""
    tag = re.match(r"\s*<[^<>]*", text)
    after = text[tag.end() :] if tag else ""
    return after.startswith(">") or (after.startswith("<") and not _may_begin(after, ("<param",)))


def _may_begin(text: str, beginnings: Sequence[str]) -> bool:
    """Whether `text` begins with one of `beginnings` but for blanks, or may do so when it continues."""
    text = re.sub(r"\s", "", text[:MAX_TAG]).replace("'", '"').lower()
    return any(text.startswith(one) or one.startswith(text) for one in beginnings)


def _signature(tool: Mapping[str, Any]) -> tuple[str, dict[str, ArgumentType]]:
    """A tool's name and the types of its parameters."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise UsageError(f"a tool must be an object that names its function, found {tool!r:.80}")
    return name, argument_types(function.get("parameters"))
