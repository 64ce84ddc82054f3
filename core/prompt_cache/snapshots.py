"""Snapshots: copies of a `Cache`, found by the prefix of ids they have read, under a byte budget.

A recurrent state cannot be trimmed, so returning to an earlier position needs a snapshot. Keys and values are
shared: a snapshot on the way of a live state reads that state's buffers, any other one keeps only the tokens
that the snapshot before it lacks.
"""

import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal

from ..machine.backend import mx
from ..machine.device import device_free_nbytes
from ..model.cache import Cache
from .prefix_tree import PrefixNode, PrefixTree

# A: before a thought may open; prompt: where decoding begins; B: the end of a turn;
# cut: a place within a prompt that other prompts may share
SnapshotKind = Literal["A", "prompt", "B", "cut"]
# the last turns, whose A snapshots are all kept; of older ones only those 4, 8, 16 ... turns ago
RECENT_TURNS = 4
# default share of the free memory, or of the device's limit, for snapshots
BUDGET_SHARE = 0.25
FALLBACK_BUDGET = 2 << 30


class Snapshot:
    """A copy of a cache, kept for `conversation` in its `turn` (from 1) at the place `kind`.

    `usable` is False where only the keys and values are left, for the snapshots that share them. `uses`
    counts how often it was kept or continued from.
    """

    def __init__(self, cache: Cache, conversation: Hashable, turn: int, kind: SnapshotKind, node: "Node"):
        self.cache, self.conversation, self.turn, self.kind = cache, conversation, turn, kind
        self.node = node
        self.usable = True
        self.uses, self.priority = 0, 0.0
        self._live: weakref.ref[Cache] | None = None

    @property
    def length(self) -> int:
        return self.cache.length

    @property
    def reads(self) -> Cache | None:
        """The live cache whose keys and values it shares, if any."""
        return self._live() if self._live else None

    @reads.setter
    def reads(self, live: Cache | None) -> None:
        self._live = weakref.ref(live) if live else None

    @property
    def saved_tokens(self) -> int:
        """The tokens that need not be read again because of this snapshot."""
        before = next((one for one in self.path()[1:] if one.usable), None)
        return self.length - (before.length if before else 0)

    def path(self) -> "list[Snapshot]":
        """Return this snapshot and those of its prefixes, the longest first."""
        return self.node.values_above()

    def is_shared(self) -> bool:
        """Whether another conversation continues from here."""
        return any(one.conversation != self.conversation for one in self.node.values_below())


Node = PrefixNode[Snapshot]


def default_budget() -> int:
    """The default number of bytes for snapshots: a quarter of what is free."""
    free = device_free_nbytes()
    return int(BUDGET_SHARE * free) if free else FALLBACK_BUDGET


class Snapshots:
    """The snapshots of all conversations with one engine.

    Beyond the budget the one that saves least for its bytes goes first, by its uses and how long ago they
    were (greedy-dual-size-frequency; Cherkasova, 1998).
    """

    def __init__(self, budget_nbytes: int | None = None):
        self.budget_nbytes = default_budget() if budget_nbytes is None else budget_nbytes
        self._tree: PrefixTree[Snapshot] = PrefixTree()
        self._clock = 0.0  # the priority of the last one that had to go

    def __iter__(self) -> Iterator[Snapshot]:
        """Yield the usable ones, a prefix before what it begins."""
        return (one for one in self._tree if one.usable)

    def keep(
        self, live: Cache, ids: Sequence[int], turn: int, kind: SnapshotKind, conversation: Hashable = None
    ) -> None:
        """Save a copy of `live`, which has read exactly `ids`; it may read on."""
        node = self._tree.insert(ids)
        kept = node.value
        if kept is None:
            kept = node.value = Snapshot(_copy(live), conversation, turn, kind, node)
            kept.reads = live
        elif not kept.usable:
            kept.cache.take_states(_copy(live))
            kept.usable = True
        if kept.kind != "A":
            kept.conversation, kept.turn, kept.kind = conversation, turn, kind
        self._use(kept)
        self._thin(conversation, turn)
        self.shrink(self.budget_nbytes)

    def add(self, cache: Cache, ids: Sequence[int]) -> Snapshot:
        """Take over a cache that was read from a file; returns its snapshot."""
        node = self._tree.insert(ids)
        if node.value is None:
            node.value = Snapshot(cache, None, 0, "cut", node)
        elif not node.value.usable:
            node.value.cache.take_states(cache)
            node.value.usable = True
        self._use(node.value)
        return node.value

    def find(self, ids: Sequence[int]) -> Snapshot | None:
        """Return the snapshot of the longest prefix of `ids`, if any."""
        return next((one for one in self._tree.match(ids)[0].values_above() if one.usable), None)

    def known_length(self, ids: Sequence[int]) -> int:
        """Return how many of `ids` are the beginning of something that was read."""
        return self._tree.match(ids)[1]

    def follow(self, snapshot: Snapshot, live: Cache) -> Cache:
        """Return a cache that continues from `snapshot`, in place of the live cache.

        Snapshots on the way to it share its keys and values from here on.
        """
        self._use(snapshot)
        path, in_place = snapshot.path(), snapshot.reads is live
        self._part_from(live, but=path)
        cache = snapshot.cache.copy()
        if in_place:
            cache.reclaim()
        else:
            cache.own()
        for one in path:
            if not in_place or one.reads is not live:
                one.cache.share(cache)
            one.reads = cache
        self.shrink(self.budget_nbytes)
        return cache

    def part_from(self, live: Cache) -> None:
        """Give the snapshots that read the keys and values of `live` their own: it reads no more."""
        self._part_from(live, but=())
        self.shrink(self.budget_nbytes)

    def _part_from(self, live: Cache, but: Sequence[Snapshot]) -> None:
        for one in self._tree:
            if one.reads is not live or one in but:
                continue
            before = one.path()[1:]
            if before:
                one.cache.share(before[0].cache)
            else:
                one.cache.own()
            one.reads = None

    def clear(self) -> None:
        """Drop all snapshots."""
        self._tree = PrefixTree()

    @property
    def nbytes(self) -> int:
        """The bytes of all snapshots, each shared buffer counted once, those of live caches not at all."""
        kept = list(self._tree)  # what buffers are based on belongs to one of them, too
        live = {id(buffer) for one in kept if one.reads for buffer in one.reads.buffers()}
        own = {id(buffer): buffer.nbytes for one in kept for buffer in one.cache.buffers()}
        keys_and_values = sum(nbytes for key, nbytes in own.items() if key not in live)
        return keys_and_values + sum(one.cache.state_nbytes for one in kept)

    def shrink(self, nbytes: int) -> None:
        """Drop the least useful snapshots until the rest take at most `nbytes`."""
        while self.nbytes > nbytes:
            last = min(self, key=lambda one: (one.priority, one.length), default=None)
            if last is None:
                return
            self._clock = max(self._clock, last.priority)
            self._drop(last)

    def _drop(self, snapshot: Snapshot) -> None:
        """Drop a snapshot; its keys and values stay while others share them."""
        if snapshot.node.children:
            snapshot.cache.drop_states()
            snapshot.usable = False
            return
        before = snapshot.path()[1:]
        self._tree.remove(snapshot.node)
        if before and not before[0].usable and not before[0].node.children:
            self._drop(before[0])

    def _use(self, snapshot: Snapshot) -> None:
        snapshot.uses += 1
        nbytes = snapshot.cache.state_nbytes or 1
        snapshot.priority = self._clock + snapshot.uses * snapshot.saved_tokens / nbytes

    def _thin(self, conversation: Hashable, newest: int) -> None:
        """Drop the conversation's snapshots that are not scheduled, unless others continue from them."""
        for one in list(self):
            mine = one.conversation == conversation and one.kind != "cut"
            if mine and not _is_scheduled(one, newest) and not one.is_shared():
                self._drop(one)


def _copy(live: Cache) -> Cache:
    """Return a copy of a live cache whose arrays are computed and own their memory."""
    saved = live.copy()
    if saved.hidden is not None:
        saved.hidden = mx.contiguous(saved.hidden)
    mx.eval(saved.arrays())
    return saved


def _is_scheduled(snapshot: Snapshot, newest: int) -> bool:
    """Whether the snapshot is kept in turn `newest` if the budget allows."""
    age = newest - snapshot.turn
    if age <= 0:
        return True
    if snapshot.kind != "A":
        return age == 1 and snapshot.kind == "B"  # the state from which this turn started
    return age < RECENT_TURNS or age & (age - 1) == 0
