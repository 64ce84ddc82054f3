"""What planning and scaling have to tell, as frozen values that JSON can carry. Imports no MLX."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlannedClass:
    """The tensors of one class and code; `nbytes` are stored, `read_nbytes` read for each decoded token."""

    name: str
    mode: str
    tensors: int
    weights: int
    nbytes: int
    read_nbytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class CurvePoint:
    """The least KL divergence that was predicted for `nbytes` bytes of weights."""

    nbytes: int
    kl: float


@dataclass(frozen=True)
class AllocationSummary:
    """Bits that were chosen under `budget`, in words, from measured sensitivities.

    `predicted_kl` is the sum of the divergences of all matrices, in nats. `sensitivity` is the name of the
    file, `digest` its hash, `text` the hash of the `tokens` tokens of text that it was measured on. `curve`
    goes from the least size to the largest; `nbytes` is the size that was chosen.
    """

    budget: str
    nbytes: int
    predicted_kl: float
    sensitivity: str
    digest: str
    text: str
    tokens: int
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class PlanSummary:
    """What converting `source` would give.

    Bandwidth and speed are None unless a memory bandwidth was assumed, `allocation` unless bits were chosen
    under a budget, `predicted_kl` unless the model's sensitivities are known.
    """

    source: str
    options: dict[str, Any]
    total_bytes: int
    bits_per_weight: float
    bytes_per_token: int
    disk_bytes: int
    classes: tuple[PlannedClass, ...]
    notes: tuple[str, ...]
    bandwidth_gb_s: float | None = None
    tokens_per_s: float | None = None
    predicted_kl: float | None = None
    allocation: AllocationSummary | None = None


@dataclass(frozen=True)
class GroupReport:
    """The result for one group: `letter` A to F, `layer` such as "layers.3", and the tensor that feeds it.

    `before` and `after` are the sum of importance (w - Q(w))^2 over its matrices. A `reason` says why the
    group is unchanged; then both are equal, or 0 if nothing was measured.
    """

    letter: str
    layer: str
    feeder: str
    alpha: float = 0.0
    before: float = 0.0
    after: float = 0.0
    reason: str = ""

    @property
    def changed(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        what = f"{self.letter} {self.feeder}"
        if self.reason:
            return f"{what}: skipped, {self.reason}"
        gain = f" ({self.after / self.before - 1:+.1%})" if self.before else ""
        return f"{what}: alpha {self.alpha:.2f}, error {self.before:.4g} to {self.after:.4g}{gain}"
