"""Quotes what others wrote: names, values and sentences, bounded and without control characters.

Every message about a file, a server or a model folder goes through here, so none repeats megabytes of it.
"""

import reprlib
from typing import Any

MAX_NAME = 120
MAX_VALUE = 60
MAX_SENTENCE = 2000
MAX_INTEGER_BITS = 14_000  # Python writes no integer of more than 4,300 digits


class _Values(reprlib.Repr):
    """A `repr` that never builds more than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = MAX_VALUE

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        if x.bit_length() > MAX_INTEGER_BITS:
            return f"a number of about {x.bit_length() * 3 // 10:,} digits"
        return shorten(repr(x), MAX_VALUE // 2)


_values = _Values()


def quote_value(value: Any, limit: int = MAX_VALUE) -> str:
    """The `repr` of a value from an untrusted file, cut to `limit` characters."""
    return shorten(_values.repr(value), limit)


def printable(name: str, limit: int = MAX_NAME) -> str:
    """A name from an untrusted file, cut to `limit` characters; its `repr` if it is not printable."""
    short = shorten(name, limit)
    return short if short.isprintable() else repr(short)


def shorten(text: str, limit: int) -> str:
    """`text`, or its beginning and "..." if it is longer than `limit`."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def bound_sentence(text: str) -> str:
    """A message with its middle cut out beyond MAX_SENTENCE and its control characters escaped."""
    if len(text) > MAX_SENTENCE:
        text = f"{text[: MAX_SENTENCE * 2 // 3]} ... {text[-MAX_SENTENCE // 3 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
