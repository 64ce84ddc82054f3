"""The live state of a session: a cache and the exact ids that it has read.

Extends the cache, restores a snapshot or starts over. Cache and ids always agree; a caller that cannot
guarantee it calls `forget`.
"""

from collections.abc import Callable, Iterator, Sequence

from ..engine.engine import Engine
from ..errors import UsageError
from ..events import Sync
from ..generation.decode import TimedChunks, prefill
from ..generation.speculate import DraftMemory
from ..machine.backend import mx
from ..model.cache import Cache
from .snapshots import SnapshotKind, Snapshots

AHEAD_SECONDS = 0.15  # of one chunk: what a command may have to wait


class LiveState:
    """A cache, the exact `ids` that it has read, and snapshots of earlier states."""

    def __init__(self, engine: Engine, snapshot_budget: int | None, *, quantized_kv: bool):
        """Start empty; `snapshot_budget` is in bytes, None takes a share of the free memory."""
        self.engine, self.quantized_kv = engine, quantized_kv
        if snapshot_budget is None and engine.model.plan is not None:
            snapshot_budget = engine.model.plan.snapshot_budget_nbytes or None
        self.snapshots = Snapshots(snapshot_budget)
        self.drafts = False  # whether the MTP head reads prompts too
        self.draft_memory = DraftMemory()
        self._timed = TimedChunks(AHEAD_SECONDS)
        self.forget()

    def sync(self, ids: Sequence[int]) -> Sync:
        """Bring the live state to the longest known prefix of `ids`; returns how."""
        snapshot = self.snapshots.find(ids)
        live = len(self.ids) if self.ids and list(ids[: len(self.ids)]) == self.ids else 0
        if live and (snapshot is None or snapshot.length <= live):
            return Sync("extend", live, "the live state is a prefix of this prompt")
        if snapshot is None:
            why = "nothing was read yet" if not self.ids else "no snapshot is a prefix of this prompt"
            self.forget()
            return Sync("rebuild", 0, why)
        self.replace(snapshot.cache.copy(), list(ids[: snapshot.length]))
        return Sync("restore", snapshot.length, f"snapshot {snapshot.kind} of turn {snapshot.turn}")

    def read(
        self, ids: Sequence[int], cancelled: Callable[[], bool], *, ahead: bool = False
    ) -> Iterator[int]:
        """Read the part of `ids` that is missing, in chunks; yields how many ids have been read.

        Stops between two chunks when `cancelled()`. Nothing waits for reading `ahead`, so its chunks are
        short: a request that arrives meanwhile begins at once.
        """
        start, timed = len(self.ids), self._timed if ahead else None
        model, rest = self.engine.model, ids[start:]
        for done in prefill(model, self.cache, rest, cancelled, drafts=self.drafts, timed=timed):
            self.ids = list(ids[: start + done])
            yield start + done

    def forget(self) -> None:
        """Start over with an empty cache."""
        self.replace(self.engine.model.new_cache(quantized=self.quantized_kv), [])

    def replace(self, cache: Cache, ids: list[int]) -> None:
        """Continue from `cache`, which has read exactly `ids`."""
        self.cache, self.ids = cache, ids

    def keep_snapshot(self, kind: SnapshotKind, turn: int) -> None:
        """Snapshot the live state in `turn`, counted from 1."""
        self.snapshots.keep(self.cache, self.ids, turn, kind)

    def logits(self) -> mx.array:
        """Compute the logits [V] float32 after the last of `ids`, without changing the live state."""
        if self.cache.hidden is None:
            raise UsageError("nothing was read yet")
        return self.engine.model.logits(self.cache.hidden)[-1]
