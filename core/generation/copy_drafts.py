"""Drafts copied from the context: where its last ids occurred before, what followed them is proposed.

Needs no model. Finds the longest earlier occurrence, the latest among equally long ones, in constant time for
most ids: n-grams are looked up by their hash, and a match that goes on needs no look-up.
"""

from collections.abc import Sequence
from itertools import islice

# ids that a match has at least: shorter ones are mostly followed by something else
SHORTEST_MATCH = 3
# earlier occurrences of one n-gram that are compared, from the latest on
MOST_CANDIDATES = 64
# ids that are compared at most: a longer match is hardly better
LONGEST_COMPARED = 64

NGram = tuple[int, ...]


class CopyDrafts:
    """The ids of a context with their n-grams, and the best match of the last ones."""

    def __init__(self, ids: Sequence[int] = ()):
        self._ids: list[int] = []
        self._latest: dict[NGram, int] = {}  # where the ids after an n-gram begin
        self._earlier: list[int] = []  # for each such place the one before it with the same n-gram, or 0
        # how many ids match, and where those after their earlier occurrence begin
        self.matched = self._source = 0
        self.extend(ids)

    def follow(self, ids: Sequence[int]) -> None:
        """Continue with the context `ids`, which mostly only adds to the one before."""
        known = len(self._ids)
        if list(ids[:known]) != self._ids:
            self.__init__(ids)
        else:
            self.extend(islice(ids, known, None))

    def extend(self, ids: Sequence[int] | islice) -> None:
        """Add the ids that follow."""
        for id in ids:
            self.add(id)

    def add(self, id: int) -> None:
        """Add the id that follows."""
        continues = self.matched and self._ids[self._source] == id
        self._ids.append(id)
        end = len(self._ids)
        self._earlier.append(0)
        if end < SHORTEST_MATCH:
            return
        ngram = tuple(self._ids[end - SHORTEST_MATCH :])
        before = self._latest.get(ngram, 0)
        if continues:
            self.matched, self._source = self.matched + 1, self._source + 1
        else:
            self.matched, self._source = self._longest(before)
        self._latest[ngram] = end
        self._earlier[end - 1] = before

    def proposal(self, count: int) -> list[int]:
        """Return the `count` ids that followed the match, or none without one.

        Where the earlier occurrence overlaps the end, its period goes on.
        """
        if not self.matched:
            return []
        period = len(self._ids) - self._source
        found = self._ids[self._source : self._source + count]
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _longest(self, place: int) -> tuple[int, int]:
        """Return length and place of the best match among `place` and earlier ones with the same n-gram."""
        best, found = 0, 0
        for _ in range(MOST_CANDIDATES):
            if not place:
                break
            length = self._common(place)
            if length > best:
                best, found = length, place
            place = self._earlier[place - 1]
        return best, found

    def _common(self, place: int) -> int:
        """Return how many of the last ids equal those before `place`."""
        ids, end = self._ids, len(self._ids)
        most = min(place, LONGEST_COMPARED)
        length = SHORTEST_MATCH
        while length < most and ids[place - 1 - length] == ids[end - 1 - length]:
            length += 1
        return length
