"""Snapshots: copies of a `Cache`, found by the prefix of ids they have read, under a byte budget.

A recurrent state cannot be trimmed, so returning to an earlier position needs a snapshot. Snapshots along one
sequence share their KV buffers; recurrent states are not shared and take most of the memory.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..machine.backend import mx
from ..machine.device import device_free_nbytes
from ..model.cache import Cache, KVCache

# A: before a thought may open; prompt: where decoding begins; B: the end of a turn
SnapshotKind = Literal["A", "prompt", "B"]
# the last turns, whose A snapshots are all kept; of older ones only those 4, 8, 16 ... turns ago
RECENT_TURNS = 4
# default share of the free memory, or of the device's limit, for snapshots
BUDGET_SHARE = 0.25
FALLBACK_BUDGET = 2 << 30


@dataclass(eq=False)
class Snapshot:
    """A copy of a cache and the `digest` of its ids; `turn` counts from 1, `kind` is the place in it."""

    cache: Cache
    digest: bytes
    turn: int
    kind: SnapshotKind

    @property
    def length(self) -> int:
        return self.cache.length


def default_budget() -> int:
    """The default number of bytes for snapshots: a quarter of what is free."""
    free = device_free_nbytes()
    return int(BUDGET_SHARE * free) if free else FALLBACK_BUDGET


class Snapshots:
    """The snapshots of one session."""

    def __init__(self, budget_nbytes: int | None = None):
        self.budget_nbytes = default_budget() if budget_nbytes is None else budget_nbytes
        self._snapshots: list[Snapshot] = []

    def __iter__(self):
        return iter(self._snapshots)

    def keep(self, cache: Cache, ids: Sequence[int], turn: int, kind: SnapshotKind) -> None:
        """Save a copy of `cache`, which has read exactly `ids`; the cache itself may read on."""
        digest = prefix_digests(ids, [len(ids)])[len(ids)]
        self._snapshots = [s for s in self._snapshots if (s.digest, s.kind) != (digest, kind)]
        saved = cache.copy()
        if saved.hidden is not None:
            saved.hidden = mx.contiguous(saved.hidden)
        mx.eval(saved.arrays())
        self._snapshots.append(Snapshot(saved, digest, turn, kind))
        self._thin(turn)

    def find(self, ids: Sequence[int]) -> Snapshot | None:
        """Return the snapshot of the longest prefix of `ids`, if any."""
        prefix = prefix_digests(ids, {s.length for s in self._snapshots if s.length <= len(ids)})
        matching = [s for s in self._snapshots if prefix.get(s.length) == s.digest]
        return max(matching, key=lambda s: s.length, default=None)

    def clear(self) -> None:
        """Drop all snapshots."""
        self._snapshots = []

    @property
    def nbytes(self) -> int:
        """The bytes of all snapshots, each shared KV buffer counted once."""
        buffers = {
            id(layer.buffer): layer.nbytes
            for snapshot in self._snapshots
            for layer in (*snapshot.cache.layers, snapshot.cache.draft)
            if isinstance(layer, KVCache)
        }
        return sum(s.cache.state_nbytes for s in self._snapshots) + sum(buffers.values())

    def _thin(self, newest: int) -> None:
        """Drop the snapshots that are not scheduled, then the least useful until the rest fit the budget."""
        self._snapshots = [s for s in self._snapshots if _is_scheduled(s, newest)]
        while len(self._snapshots) > 1 and self.nbytes > self.budget_nbytes:
            self._snapshots.remove(min(self._snapshots, key=lambda s: (s.turn, s.kind == "A", s.length)))
        if self.nbytes > self.budget_nbytes:
            self._snapshots = []


def _is_scheduled(snapshot: Snapshot, newest: int) -> bool:
    """Whether the snapshot is kept in turn `newest` if the budget allows."""
    age = newest - snapshot.turn
    if age <= 0:
        return True
    if snapshot.kind != "A":
        return age == 1 and snapshot.kind == "B"  # the state from which this turn started
    return age < RECENT_TURNS or age & (age - 1) == 0


def prefix_digests(ids: Sequence[int], lengths: Iterable[int]) -> dict[int, bytes]:
    """Return digests of the first n ids by n, for each n in `lengths`."""
    running, done, found = hashlib.blake2b(digest_size=16), 0, {}
    for length in sorted(set(lengths)):
        running.update(array("I", ids[done:length]).tobytes())
        done = length
        found[length] = running.copy().digest()
    return found
