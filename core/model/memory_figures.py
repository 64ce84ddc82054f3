"""The limits of a running model, as a frozen value that JSON can carry. Imports no MLX."""

from dataclasses import asdict, dataclass
from typing import Any

# the share of the memory beside the weights that snapshots of earlier turns may take
SNAPSHOT_SHARE = 0.25
# the process itself, the tokenizer, compiled kernels
OVERHEAD_NBYTES = 300 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Limits of a running model: the longest `context` and the prefill `chunk` in tokens, the rest in bytes.

    `free_nbytes` is the free memory it was planned for; 0 means unknown, and nothing is limited. The first
    picture, of up to `picture_tokens`, takes `picture_nbytes` besides, for the vision tower and its
    activations; both are 0 for a model without a tower.
    """

    context: int
    chunk: int
    weights_nbytes: int
    state_nbytes: int
    kv_nbytes: int
    kv_nbytes_per_token: int
    transient_nbytes: int
    snapshot_nbytes: int
    free_nbytes: int
    picture_tokens: int = 0
    picture_nbytes: int = 0

    @property
    def process_nbytes(self) -> int:
        """Bytes of the process itself, which every model needs."""
        return OVERHEAD_NBYTES

    @property
    def total_nbytes(self) -> int:
        """Bytes at the longest context, snapshots included."""
        kept = self.weights_nbytes + self.state_nbytes + self.kv_nbytes + self.snapshot_nbytes
        return OVERHEAD_NBYTES + kept + self.transient_nbytes

    @property
    def snapshot_budget_nbytes(self) -> int:
        """Bytes that snapshots may take, a share of the memory beside the weights; 0 if that is unknown.

        At the longest context `snapshot_nbytes` of it remain. Snapshots count the keys and values that they
        share with the live cache.
        """
        return int(SNAPSHOT_SHARE * max(0, self.free_nbytes - self.weights_nbytes))

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"total_nbytes": self.total_nbytes}
