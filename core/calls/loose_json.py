"""JSON as language models write it, read with its usual faults.

Forgives single quotes, bare keys, Python's words and tuples, missing and trailing commas, line breaks and
unescaped quotes inside strings, unknown escapes, comments, and closing brackets that are missing or do not
match. Well-formed JSON is read exactly. Takes time linear in the text.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

MAX_DEPTH, MAX_DIGITS = 150, 4000
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
BRACKETS = {"{": "}", "[": "]", "(": ")"}
BLANKS = re.compile(r"(?:\s+|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.])")
WORD = re.compile(r"[A-Za-z_$][\w$.-]*")
QUOTES = {'"': re.compile(r'\\.|"', re.DOTALL), "'": re.compile(r"\\.|'", re.DOTALL)}
# what tells the quote at the end of a value from one inside it
AFTER_STRING = re.compile(
    r"\s*(?:[}\])]|,\s*(?:[\"'{\[(}\]\d-]|(?:true|false|null|True|False|None)\b|[A-Za-z_$][\w$.-]*\s*:|/[/*]|\Z)"
    r"|\n\s*[\"'][\w$.-]+[\"']\s*:|</(?:tool_call|function)|```|\Z)"
)
AFTER_KEY = re.compile(r"\s*:")
ESCAPES = re.compile(r"""\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|(.))|(")""", re.DOTALL)


class Unfinished(ValueError):
    """The text ends inside a string, or inside a value that had to be complete."""


def read_loosely(text: str, start: int = 0, *, complete: bool = False) -> tuple[Any, int]:
    """Return the value that begins at `start`, and the place after it.

    Closing brackets may be missing at the end unless the value must be `complete`. Raises Unfinished where
    the text ends too early, and ValueError for what cannot be read.
    """
    return _Reader(text, complete).value(start, 0)


@dataclass(frozen=True)
class _Reader:
    text: str
    complete: bool

    def value(self, place: int, depth: int) -> tuple[Any, int]:
        text, place = self.text, self.skip(place)
        begin = text[place : place + 1]
        if depth > MAX_DEPTH:
            raise ValueError("it nests too deeply")
        if begin == "{":
            return self.object(place + 1, depth)
        if begin in ("[", "("):
            return self.array(place + 1, depth, BRACKETS[begin])
        if begin in QUOTES:
            return self.string(place, AFTER_STRING)
        if number := NUMBER.match(text, place):
            return _number(number[0]), number.end()
        word = WORD.match(text, place)
        if word is None or word[0] not in WORDS:
            raise ValueError(f"no value begins at character {place}")
        return WORDS[word[0]], word.end()

    def object(self, place: int, depth: int) -> tuple[dict[str, Any], int]:
        """Read an object after its opening brace."""
        found: dict[str, Any] = {}
        while (end := self.end_of(place, "}")) is None:
            key, place = self.key(self.skip(place))
            found[key], place = self.value(place, depth + 1)
        return found, end

    def array(self, place: int, depth: int, closer: str) -> tuple[list[Any], int]:
        """Read an array after its opening bracket."""
        found: list[Any] = []
        while (end := self.end_of(place, closer)) is None:
            value, place = self.value(place, depth + 1)
            found.append(value)
        return found, end

    def end_of(self, place: int, closer: str) -> int | None:
        """Return the place after the end of an object or array, or None if another item follows.

        A closing bracket of another kind, a closing tag and the end of the text end it too.
        """
        text, place = self.text, self.skip(place)
        if text.startswith(closer, place):
            return place + 1
        if self.complete and place == len(text):
            raise Unfinished("the text ends inside a value")
        ends = place == len(text) or text[place] in "}])" or text.startswith(("</", "```"), place)
        return place if ends else None

    def key(self, place: int) -> tuple[str, int]:
        """Read a key and its colon."""
        if self.text[place] in QUOTES:
            key, place = self.string(place, AFTER_KEY)
        elif word := WORD.match(self.text, place):
            key, place = word[0], word.end()
        else:
            raise ValueError(f"no key begins at character {place}")
        colon = AFTER_KEY.match(self.text, place)
        if colon is None:
            raise ValueError(f"no colon follows the key {key[:40]!r}")
        return key, colon.end()

    def string(self, place: int, after: re.Pattern[str]) -> tuple[str, int]:
        """Read a string, which ends at the first quote before what `after` matches."""
        text, quote = self.text, self.text[place]
        if text.startswith(quote * 3, place):  # as Python has it
            end = text.find(quote * 3, place + 3)
            if end < 0:
                raise Unfinished("the text ends inside a string")
            return text[place + 3 : end], end + 3
        for mark in QUOTES[quote].finditer(text, place + 1):
            if mark[0] == quote and after.match(text, mark.end()):
                return _unescape(text[place + 1 : mark.start()]), mark.end()
        raise Unfinished("the text ends inside a string")

    def skip(self, place: int) -> int:
        """Return the place after blanks, comments and commas."""
        while True:
            end = BLANKS.match(self.text, place).end()  # pyright: ignore[reportOptionalMemberAccess]
            if not self.text.startswith(",", end):
                return end
            place = end + 1


def _unescape(body: str) -> str:
    """Return what a string's characters stand for; a backslash before any other character is one."""
    if "\\" not in body:
        return body
    return json.loads(f'"{ESCAPES.sub(_valid_escape, body)}"', strict=False)


def _valid_escape(found: re.Match[str]) -> str:
    known, other, _ = found.groups()
    if known:
        return found[0]
    return '\\"' if not other else "'" if other == "'" else "\\\\" + json.dumps(other)[1:-1]


def _number(digits: str) -> int | float:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    value = float(digits) if set(digits) & set(".eE") else int(digits)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is out of range")
    return value
