"""Kinds of values that settings take: each checks a TOML value and parses a word.

Refuses other values with ValueError; whoever reads a source names it in the message.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...core.errors import UsageError

OFF = "off"
YES, NO = ("true", "on", "yes", "1"), ("false", "off", "no", "0")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class Refusal(ValueError):
    """A value that is refused for a reason of its own, which the message gives."""


class Kind(Protocol):
    """The values that a setting takes; both methods raise ValueError for any other."""

    @property
    def wanted(self) -> str: ...
    def check(self, value: Any) -> Any:
        """Return a TOML value in the form in which settings hold it."""
        ...

    def read(self, text: str) -> Any:
        """Parse one word, such as an environment variable's value."""
        ...


@dataclass(frozen=True)
class Flag:
    """True or false; with `auto` also the word "auto", held as None."""

    auto: bool = False

    @property
    def wanted(self) -> str:
        return "true, false or auto" if self.auto else "true or false"

    def check(self, value: Any) -> bool | None:
        if isinstance(value, bool):
            return value
        if self.auto and value == "auto":
            return None
        raise ValueError

    def read(self, text: str) -> bool | None:
        word = text.lower()
        return self.check(True if word in YES else False if word in NO else word)


def list_words(kind: Kind) -> tuple[str, ...]:
    """Return the words that a kind takes, if they can be listed."""
    match kind:
        case Choice(options):
            return tuple(map(str, options))
        case Several(options):
            return options
        case Flag(auto):
            return ("on", "off", "auto") if auto else ("on", "off")
    return ()


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, or `alone`, a value outside that range with a meaning of its own."""

    low: float
    high: float
    whole: bool = False
    alone: float | None = None

    @property
    def wanted(self) -> str:
        alone = "" if self.alone is None else f", or {self.alone:g}"
        if self.whole:
            return f"a whole number from {self.low:,} to {self.high:,}{alone}"
        return f"a number from {self.low:g} to {self.high:g}{alone}"

    def check(self, value: Any) -> float:
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError
        if not self.low <= value <= self.high and value != self.alone:
            raise ValueError
        return value

    def read(self, text: str) -> float:
        return self.check(int(text) if self.whole else float(text))


@dataclass(frozen=True)
class Size:
    """A number of bytes."""

    wanted = "bytes, as a number or like '2 GB' or '512 MiB'"

    def check(self, value: Any) -> int:
        if isinstance(value, str):
            return self.read(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 50:
            return value
        raise ValueError

    def read(self, text: str) -> int:
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kmg]i?|)b?", text.strip().lower())
        if found is None:
            raise ValueError
        return self.check(int(float(found[1]) * UNITS[found[2]]))


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    options: tuple[Any, ...]

    @property
    def wanted(self) -> str:
        return " or ".join(map(str, self.options))

    def check(self, value: Any) -> Any:
        if isinstance(value, bool) or value not in self.options:
            raise ValueError
        return value

    def read(self, text: str) -> Any:
        return self.check(next((option for option in self.options if str(option) == text), None))


@dataclass(frozen=True)
class Text:
    """A text of at most `most` characters that is not empty and matches `pattern`."""

    pattern: str = r"(?s).+"
    wanted: str = "a text"
    most: int = 1 << 14

    def check(self, value: Any) -> str:
        if isinstance(value, str) and len(value) <= self.most and re.fullmatch(self.pattern, value):
            return value
        raise ValueError

    def read(self, text: str) -> str:
        return self.check(text)


@dataclass(frozen=True)
class Texts:
    """Several texts; a word holds them with `separator` between, or, without one, is a single text."""

    most: int = 32
    separator: str | None = None

    @property
    def wanted(self) -> str:
        return f"at most {self.most} texts, none of them empty"

    def check(self, value: Any) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or len(texts) > self.most:
            raise ValueError
        return [Text().check(text) for text in texts]

    def read(self, text: str) -> list[str]:
        return self.check(text.split(self.separator) if self.separator else [text])


@dataclass(frozen=True)
class Several:
    """Some of a few words, each at most once, in the order of `options`; a word holds them with commas."""

    options: tuple[str, ...]

    @property
    def wanted(self) -> str:
        return f"some of {', '.join(self.options)}"

    def check(self, value: Any) -> list[str]:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list) or any(one not in self.options for one in given):
            raise ValueError
        return [one for one in self.options if one in given]

    def read(self, text: str) -> list[str]:
        return self.check([word.strip() for word in text.lower().split(",")])


@dataclass(frozen=True)
class SchemaFile:
    """A JSON schema and the absolute path of the file that it was read from."""

    path: str
    schema: Mapping[str, Any]

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class SchemaPath:
    """The path of a JSON schema's file, which is read at once; the word "off" is held as None."""

    wanted = "a file with a JSON schema, or off"

    def check(self, value: Any) -> SchemaFile | None:
        if isinstance(value, SchemaFile):
            return value
        if not isinstance(value, str) or not value:
            raise ValueError
        return None if value == OFF else self._file(value)

    def read(self, text: str) -> SchemaFile | None:
        return self.check(text)

    def _file(self, path: str) -> SchemaFile:
        from ...core import read_schema

        try:
            place = Path(path).expanduser().absolute()
            return SchemaFile(str(place), read_schema(place))
        except (UsageError, RuntimeError) as error:  # the latter for the home of a user who has none
            raise Refusal(str(error)) from error


@dataclass(frozen=True)
class Table:
    """A TOML table, whose content is checked where it is used."""

    wanted = "a table"

    def check(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError
        return value

    def read(self, text: str) -> dict[str, Any]:
        raise ValueError(text)
