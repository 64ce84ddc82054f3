"""Restorable positions: a `Cache` with the ids it has read, found by token prefix, under a byte budget.

A recurrent state cannot be rewound, so whoever wants to go back needs one of these. Key-value arrays are
shared between snapshots of one line of ids; recurrent states are not, and make most of the cost.
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
Kind = Literal["A", "prompt", "B"]
# turns whose A snapshot is kept, counted from the last; older ones are thinned by powers of two
RECENT_TURNS = 4
# of the free memory, what snapshots may take by default
BUDGET_SHARE = 0.25
FALLBACK_BUDGET = 2 << 30


@dataclass(eq=False)
class Snapshot:
    """A cache after `ids`; `turn` counts inputs from 1 and `kind` says where in the turn it was cut."""

    cache: Cache
    digest: bytes
    turn: int
    kind: Kind

    @property
    def length(self) -> int:
        return self.cache.length


def default_budget() -> int:
    """The default number of bytes for snapshots: a quarter of what is free."""
    free = device_free_nbytes()
    return int(BUDGET_SHARE * free) if free else FALLBACK_BUDGET


class Snapshots:
    """All snapshots of one session."""

    def __init__(self, budget_nbytes: int | None = None):
        self.budget_nbytes = default_budget() if budget_nbytes is None else budget_nbytes
        self._kept: list[Snapshot] = []

    def __iter__(self):
        return iter(self._kept)

    def keep(self, cache: Cache, ids: Sequence[int], turn: int, kind: Kind) -> None:
        """Save `cache`, which has read exactly `ids`; it may go on reading afterwards."""
        digest = digests(ids, [len(ids)])[len(ids)]
        self._kept = [s for s in self._kept if (s.digest, s.kind) != (digest, kind)]
        saved = cache.copy()
        if saved.hidden is not None:
            saved.hidden = mx.contiguous(saved.hidden)
        mx.eval(saved.arrays())
        self._kept.append(Snapshot(saved, digest, turn, kind))
        self._thin(turn)

    def find(self, ids: Sequence[int]) -> Snapshot | None:
        """The longest snapshot whose ids begin `ids`."""
        prefix = digests(ids, {s.length for s in self._kept if s.length <= len(ids)})
        fitting = [s for s in self._kept if prefix.get(s.length) == s.digest]
        return max(fitting, key=lambda s: s.length, default=None)

    def clear(self) -> None:
        self._kept = []

    @property
    def nbytes(self) -> int:
        """Bytes held: each state once, each shared key-value buffer once."""
        buffers = {
            id(layer.buffer): layer.nbytes
            for snapshot in self._kept
            for layer in (*snapshot.cache.layers, snapshot.cache.draft)
            if isinstance(layer, KVCache)
        }
        return sum(s.cache.state_nbytes for s in self._kept) + sum(buffers.values())

    def _thin(self, newest: int) -> None:
        """Drop what the schedule does not ask for, then the least useful until the budget holds."""
        self._kept = [s for s in self._kept if _scheduled(s, newest)]
        while len(self._kept) > 1 and self.nbytes > self.budget_nbytes:
            self._kept.remove(min(self._kept, key=lambda s: (s.turn, s.kind == "A", s.length)))
        if self.nbytes > self.budget_nbytes:
            self._kept = []


def _scheduled(snapshot: Snapshot, newest: int) -> bool:
    age = newest - snapshot.turn
    if age <= 0:
        return True
    if snapshot.kind != "A":
        return age == 1 and snapshot.kind == "B"  # the state that this turn began from
    return age < RECENT_TURNS or age & (age - 1) == 0


def digests(ids: Sequence[int], lengths: Iterable[int]) -> dict[int, bytes]:
    """A digest of the first n ids, for each n of `lengths`."""
    running, done, found = hashlib.blake2b(digest_size=16), 0, {}
    for length in sorted(set(lengths)):
        running.update(array("I", ids[done:length]).tobytes())
        done = length
        found[length] = running.copy().digest()
    return found
