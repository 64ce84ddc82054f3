"""The block of each row of the transcript: block heights, some of them guesses, and their sums."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate


class Rows:
    """Heights by block number; their sums are computed when needed, from the first changed block on."""

    def __init__(self, heights: Iterable[int] = ()) -> None:
        self._heights = list(heights)
        self._guessed = [True] * len(self._heights)
        self._tops = [0]
        self._valid = 0  # `_tops[: _valid + 1]` is right

    def __len__(self) -> int:
        return len(self._heights)

    def insert(self, index: int, height: int) -> None:
        """Insert a block of a guessed height."""
        self._heights.insert(index, height)
        self._guessed.insert(index, True)
        self._valid = min(self._valid, index)

    def set(self, index: int, height: int) -> int:
        """Set the block's true height; return by how much it changed."""
        change = height - self._heights[index]
        self._guessed[index] = False
        if change:
            self._heights[index] = height
            self._valid = min(self._valid, index)
        return change

    def guess(self, index: int, height: int) -> None:
        """Replace the block's height by a guess."""
        self.set(index, height)
        self._guessed[index] = True

    def is_guessed(self, index: int) -> bool:
        return self._guessed[index]

    def guessed(self) -> Iterator[int]:
        """Yield the blocks of guessed heights, the last one first."""
        return (index for index in reversed(range(len(self._guessed))) if self._guessed[index])

    def height(self, index: int) -> int:
        return self._heights[index]

    def top(self, index: int) -> int:
        """Return the block's first row."""
        return self._sums()[index]

    @property
    def total(self) -> int:
        return self._sums()[-1]

    def at(self, y: int) -> tuple[int, int]:
        """Return the block of row `y` and the row in it, clamped to existing rows; there must be one."""
        tops = self._sums()
        y = max(0, min(y, tops[-1] - 1))
        index = bisect_right(tops, y) - 1
        return index, y - tops[index]

    def _sums(self) -> list[int]:
        if self._valid < len(self._heights) or len(self._tops) != len(self._heights) + 1:
            start = self._valid
            self._tops[start:] = accumulate(self._heights[start:], initial=self._tops[start])
            self._valid = len(self._heights)
        return self._tops
