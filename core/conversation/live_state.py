"""The live state of a session: what the model has read, extended, restored from a snapshot, or begun anew.

Cache and ids always agree; whoever cannot promise that calls `forget`.
"""

from collections.abc import Iterator, Sequence

from ..engine.engine import Engine
from ..errors import DoesNotFit, UsageError
from ..events import Sync
from ..generation.decode import prefill
from ..machine.backend import mx
from ..model.network import Model
from .snapshots import Kind, Snapshots


class Live:
    """A cache and the exact `ids` that it has read, with snapshots to go back to."""

    def __init__(self, engine: Engine, snapshot_budget: int | None, *, quantized_kv: bool):
        """`snapshot_budget` is in bytes, None for a share of the free memory."""
        self.engine, self.quantized_kv = engine, quantized_kv
        if snapshot_budget is None and engine.model.plan is not None:
            snapshot_budget = engine.model.plan.snapshot_budget_nbytes or None
        self.snapshots = Snapshots(snapshot_budget)
        self.cancelled = False
        self.drafts = 0  # how many tokens the draft head guesses at once in the reply under way
        self.forget()

    def sync(self, ids: Sequence[int]) -> Sync:
        """Make the live state one that has read a prefix of `ids`, the longest there is; says which."""
        snapshot = self.snapshots.find(ids)
        live = len(self.ids) if self.ids and list(ids[: len(self.ids)]) == self.ids else 0
        if live and (snapshot is None or snapshot.length <= live):
            return Sync("extend", live, "the live state goes on")
        if snapshot is None:
            why = "nothing was read yet" if not self.ids else "no kept state begins this prompt"
            self.forget()
            return Sync("rebuild", 0, why)
        self.cache, self.ids = snapshot.cache.copy(), list(ids[: snapshot.length])
        return Sync("restore", snapshot.length, f"state {snapshot.kind} of turn {snapshot.turn}")

    def read(self, ids: Sequence[int]) -> Iterator[int]:
        """Read what of `ids` the live state has not read, in chunks; yields how many are read.

        Stops between two chunks when `cancelled`.
        """
        start = len(self.ids)
        model = self.engine.model
        for done in prefill(model, self.cache, ids[start:], lambda: self.cancelled, drafts=self.drafts > 0):
            self.ids = list(ids[: start + done])
            yield start + done

    def forget(self) -> None:
        """Begin a live state that has read nothing."""
        self.cache, self.ids = self.engine.model.new_cache(quantized=self.quantized_kv), []

    def keep(self, kind: Kind, turn: int) -> None:
        """Snapshot the live state, in `turn`, from 1."""
        self.snapshots.keep(self.cache, self.ids, turn, kind)

    def logits(self) -> mx.array:
        """Logits [V] float32 after the last of `ids`, from the live state and without changing it."""
        if self.cache.hidden is None:
            raise UsageError("nothing was read yet")
        return self.engine.model.logits(self.cache.hidden)[-1]


def limit_of(model: Model, given: int | None, *, quantized: bool) -> tuple[int, list[str]]:
    """How many tokens a context may have, `given` at most; a sentence where model or memory allow less."""
    made_for = model.config.max_position_embeddings
    try:
        plan = model.plan_for(given, quantized=quantized)
    except DoesNotFit:
        plan = model.plan_for(None, quantized=quantized)
    fits = plan.context if plan else made_for
    if given is None or given <= fits:
        return given or fits, []
    memory = "more does not fit into this machine's memory"
    why = "the model is made for no more" if fits == made_for else memory
    return fits, [f"the context limit is {fits:,} tokens, not the {given:,} asked for: {why}"]
