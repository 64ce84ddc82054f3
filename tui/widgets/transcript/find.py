"""Occurrences of a text in the blocks, and the characters of their rows to mark."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ...text.markdown.lines import plain
from .blocks import Block, Look


class Match(NamedTuple):
    """The occurrence number `nth` in a block's text."""

    block: Block
    nth: int


class Mark(NamedTuple):
    """The characters `start` to `end` of a block's row, a part of the occurrence number `nth`."""

    row: int
    start: int
    end: int
    nth: int


class Finder:
    """Finds a text, ignoring case; `here` is the occurrence that the reader is at."""

    def __init__(self) -> None:
        self._wanted: re.Pattern[str] | None = None
        self.here: Match | None = None

    @property
    def active(self) -> bool:
        return self._wanted is not None

    def look_for(self, text: str) -> None:
        """Find `text` from now on; nothing if it is empty."""
        self._wanted = re.compile(re.escape(text), re.IGNORECASE) if text else None
        self.here = None

    def matches(self, blocks: Iterable[Block]) -> list[Match]:
        if self._wanted is None:
            return []
        return [
            Match(block, nth) for block in blocks for nth, _ in enumerate(self._wanted.finditer(block.text))
        ]

    def marks(self, block: Block, look: Look) -> list[Mark]:
        """Return the marks of the occurrences in a block's rows; one may continue on the next row."""
        if self._wanted is None:
            return []
        starts, text = [], ""
        for number, line in enumerate(block.lines(look)):
            text += line.joint if number else ""
            starts.append(len(text))
            text += plain(line)
        margin = len(block.margin.text)
        found = []
        for nth, match in enumerate(self._wanted.finditer(text)):
            for row, start in enumerate(starts):
                end = starts[row + 1] if row + 1 < len(starts) else len(text)
                first, last = max(match.start(), start), min(match.end(), end)
                if first < last:
                    found.append(Mark(row, first - start + margin, last - start + margin, nth))
        return found
