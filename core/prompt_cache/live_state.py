"""The live state: a cache and the exact ids that it has read, which all conversations with an engine share.

Extends the cache, restores a snapshot from memory or disk, or starts over. Cache and ids always agree; a
caller that cannot guarantee it calls `forget`.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path

from ..engine.engine import Engine
from ..errors import StoreError, UsageError
from ..events import Sync
from ..generation.decode import TimedChunks, prefill
from ..generation.speculate import DraftMemory
from ..machine.backend import mx
from ..model.cache import Cache
from .disk_tier import DISK_BUDGET, DiskTier
from .snapshots import Snapshot, SnapshotKind, Snapshots

# where a prompt is cut for others that begin alike: every so many tokens, and never after fewer than MIN_CUT
CUT_PERIOD, MIN_CUT = 8192, 64
# tokens that are worth a write on disk which nobody asked for
WORTH_SAVING = 512
AHEAD_SECONDS = 0.15  # of one chunk that is read ahead: what a command may have to wait


class LiveState:
    """A cache, the exact `ids` that it has read, and snapshots of earlier states.

    `notices` are sentences for the user, which the next reply passes on.
    """

    def __init__(self, engine: Engine, snapshot_budget: int | None = None, *, quantized_kv: bool = False):
        """Start empty; `snapshot_budget` is in bytes, None takes a share of the free memory."""
        self.engine, self.quantized_kv = engine, quantized_kv
        if snapshot_budget is None and engine.model.plan is not None:
            snapshot_budget = engine.model.plan.snapshot_budget_nbytes or None
        self.snapshots = Snapshots(snapshot_budget)
        self.disk: DiskTier | None = None
        self.notices: list[str] = []
        self.drafts = False  # whether the MTP head reads prompts too
        self.draft_memory = DraftMemory()
        self._timed = TimedChunks(AHEAD_SECONDS)
        self.ids: list[int] = []
        self.cache = engine.model.new_cache(quantized=quantized_kv)
        self._turn_mark = engine.tokenizer.token_id("<|im_start|>")
        self._system = engine.tokenizer.encode("system", special=False)[:1]

    def keep_on_disk(self, folder: Path, budget_nbytes: int = DISK_BUDGET) -> None:
        """Find states in `folder` from here on, and save some there, within `budget_nbytes`.

        Does nothing for a model shared by ranks: this one has only a part of its states.
        """
        if not self.engine.model.shared:
            self.disk = DiskTier(folder, self.engine, budget_nbytes, quantized=self.quantized_kv)

    def sync(self, ids: Sequence[int]) -> Sync:
        """Bring the live state to the longest known prefix of `ids`; returns how."""
        snapshot = self.snapshots.find(ids)
        live = len(self.ids) if self.ids and list(ids[: len(self.ids)]) == self.ids else 0
        known = max(live, snapshot.length if snapshot else 0)
        if (cache := self._load(ids, beyond=known)) is not None:
            snapshot = self.snapshots.add(cache, ids[: cache.length])
            self._follow(snapshot, ids)
            return Sync("restore", snapshot.length, "a state saved on disk")
        if live and (snapshot is None or snapshot.length <= live):
            return Sync("extend", live, "the live state is a prefix of this prompt")
        if snapshot is None:
            why = "nothing was read yet" if not self.ids else "no snapshot is a prefix of this prompt"
            self.forget()
            return Sync("rebuild", 0, why)
        self._follow(snapshot, ids)
        place = f"{snapshot.kind} of turn {snapshot.turn}" if snapshot.turn else "from disk"
        return Sync("restore", snapshot.length, f"snapshot {place}")

    def _follow(self, snapshot: Snapshot, ids: Sequence[int]) -> None:
        self.cache = self.snapshots.follow(snapshot, self.cache)
        self.ids = list(ids[: snapshot.length])

    def _load(self, ids: Sequence[int], beyond: int) -> Cache | None:
        """Load a state of a prefix of `ids` that is longer than `beyond`, if one is saved."""
        try:
            if self.disk is not None:
                return self.disk.load(ids, beyond)
        except StoreError as error:
            self.notices.append(f"{error}; the conversation is read again")
        return None

    def read(
        self,
        ids: Sequence[int],
        cancelled: Callable[[], bool],
        conversation: Hashable = None,
        turn: int = 1,
        *,
        ahead: bool = False,
    ) -> Iterator[int]:
        """Read the part of `ids` that is missing, in chunks; yields how many ids have been read.

        Keeps snapshots where other prompts may part from this one. Stops between two chunks when
        `cancelled()`. Nothing waits for reading `ahead`, so its chunks are short: a request that arrives
        meanwhile begins at once.
        """
        model, timed = self.engine.model, self._timed if ahead else None
        prompt = self.engine.images.mixed_prompt(ids)
        for end in [*self._cuts(ids), len(ids)]:
            start = len(self.ids)
            rest, mixed = ids[start:end], prompt.after(start) if prompt else None
            for done in prefill(
                model, self.cache, rest, cancelled, drafts=self.drafts, timed=timed, mixed=mixed
            ):
                self.ids = list(ids[: start + done])
                yield start + done
            if len(self.ids) < end:
                return
            if end < len(ids):
                self.keep_snapshot("cut", turn, conversation)

    def _cuts(self, ids: Sequence[int]) -> list[int]:
        """Return where other prompts may part from `ids`, of the places that are yet to be read.

        These are the end of the system block, which holds the tools too; the place where this prompt parts
        from what was read before; and every so many tokens.
        """
        wanted = [self._system_end(ids), self.snapshots.known_length(ids)]
        wanted += range(CUT_PERIOD, len(ids), CUT_PERIOD)
        cuts, last = [], len(self.ids)
        for place in sorted(wanted):
            if place - last >= MIN_CUT and place < len(ids):
                cuts.append(place)
                last = place
        return cuts

    def _system_end(self, ids: Sequence[int]) -> int:
        """Return where the first message after the system block begins; 0 where there is no such block."""
        if not ids or ids[0] != self._turn_mark or list(ids[1:2]) != self._system:
            return 0
        return next((place for place in range(1, len(ids)) if ids[place] == self._turn_mark), 0)

    def forget(self) -> None:
        """Start over with an empty cache."""
        try:
            self.snapshots.part_from(self.cache)
        except (RuntimeError, MemoryError):  # what failed to compute may be part of what they share
            self.snapshots.clear()
        self.cache, self.ids = self.engine.model.new_cache(quantized=self.quantized_kv), []

    def keep_snapshot(self, kind: SnapshotKind, turn: int, conversation: Hashable = None) -> None:
        """Snapshot the live state in `turn`, counted from 1, of `conversation`."""
        self.snapshots.keep(self.cache, self.ids, turn, kind, conversation)

    def save(
        self, ids: Sequence[int], owner: str, *, answer_may_differ: bool = False, unasked: bool = False
    ) -> bool:
        """Save the longest known prefix of `ids` on disk, for the conversation `owner`.

        Saves the state after the system block too, which other conversations share, and where the last answer
        may differ, the one before it. Returns False where nothing is known, or it exceeds the budget;
        `unasked` also where it adds little to what is saved. Raises DoesNotFit where the disk is full.
        """
        cache = self._longest(ids)
        if self.disk is None or cache is None or cache.hidden is None:
            return False
        if unasked and cache.length - self.disk.find(ids) < WORTH_SAVING:
            return False
        for one in self._earlier(ids[: cache.length - 1], answer_may_differ):
            self.disk.save(one.cache, ids[: one.length], owner, unasked=unasked)
        return self.disk.save(cache, ids[: cache.length], owner, unasked=unasked)

    def _earlier(self, ids: Sequence[int], answer_may_differ: bool) -> list[Snapshot]:
        """Return the snapshots of `ids` from which other prompts are likely to go on, the shortest first."""
        snapshot = self.snapshots.find(ids)
        path = [one for one in snapshot.path() if one.usable and one.length >= MIN_CUT] if snapshot else []
        cuts = [one for one in path if one.kind == "cut"]
        questions = [one for one in path if one.kind == "A"] if answer_may_differ else []
        return sorted({*cuts[-1:], *questions[:1]}, key=lambda one: one.length)

    def _longest(self, ids: Sequence[int]) -> Cache | None:
        """Return the cache, live or kept, that has read the longest prefix of `ids`; None if none has."""
        snapshot = self.snapshots.find(ids)
        kept = snapshot.cache if snapshot else None
        if self.ids and self.ids == list(ids[: len(self.ids)]) and self.cache.length == len(self.ids):
            return kept if kept and kept.length > self.cache.length else self.cache
        return kept

    @property
    def text_ids(self) -> list[int]:
        """The ids with the template's own in place of those of pictures."""
        return self.engine.images.without_pictures(self.ids)

    def logits(self) -> mx.array:
        """Compute the logits [V] float32 after the last of `ids`, without changing the live state."""
        if self.cache.hidden is None:
            raise UsageError("nothing was read yet")
        return self.engine.model.logits(self.cache.hidden)[-1]
