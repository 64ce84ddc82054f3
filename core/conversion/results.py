"""What conversions and inspections have to tell, as frozen values that JSON can carry. Imports no MLX."""

from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from ..quant.results import AllocationSummary, GroupReport

MB = 10**6
DENSE = "dense"  # stands for a code where nothing is packed


@dataclass(frozen=True)
class Check:
    """How far the result is from its source.

    `weights` are relative RMS errors of a sample by code. The logits after `tokens` tokens are compared by
    relative RMS, mean KL divergence in nats, and the share of positions with the same most likely token.
    """

    weights: dict[str, float]
    tokens: int
    logits_error: float
    kl_divergence: float
    same_top: float


@dataclass(frozen=True)
class RoundingSummary:
    """How the matrices were rounded, where the conversion said so.

    With the method "gptq" `compensated` of them were, on `tokens` tokens of the calibration `text`, whose
    SHA-256 is `digest`; `unreached` matrices of single experts were not read there, and were rounded without.
    """

    method: str
    text: str = ""
    digest: str = ""
    tokens: int = 0
    compensated: int = 0
    unreached: int = 0

    def __str__(self) -> str:
        if self.method != "gptq":
            return self.method
        made = f"{self.method}, {self.compensated} matrices on {self.tokens:,} tokens of {self.text}"
        missed = f"; it never reached {self.unreached:,} matrices of experts, which are rounded as weighted"
        return made + (missed if self.unreached else "")


@dataclass(frozen=True)
class ConversionSummary:
    """What one conversion did.

    `nbytes` is the size of the weight files; `weights_nbytes` is the bfloat16 size of the weights that this
    run wrote. `seconds` is the time of writing; `total_seconds` includes the scaling search and all checks.
    `kept_shards` counts shards that an earlier run had finished. `importances` are sentences about what of
    an imatrix was used.
    """

    name: str
    source: str
    command: str
    options: dict[str, Any]
    nbytes: int
    bits_per_weight: float
    weights_nbytes: int
    seconds: float
    total_seconds: float
    kept_shards: int
    warnings: tuple[str, ...]
    repairs: tuple[str, ...]
    notes: tuple[str, ...]
    awq: tuple[GroupReport, ...]
    check: Check
    rounding: RoundingSummary | None = None
    importances: tuple[str, ...] = ()
    allocation: AllocationSummary | None = None

    @property
    def speed(self) -> str:
        """The speed of writing in bytes of the source; a remark for a run that found all shards finished."""
        if not self.weights_nbytes:
            return "all shards were there already"
        return f"{self.weights_nbytes / MB / self.seconds:.0f} MB of bfloat16 a second"


@dataclass(frozen=True, kw_only=True)
class ConversionResult(ConversionSummary):
    """The same, and the `folder` that was made."""

    folder: str


# `class` cannot name a field: these are written with the names that JSON has
class TensorSummary(Struct, frozen=True, rename={"kind": "class", "nbytes": "bytes"}):
    """One tensor: its class, its code and its size."""

    name: str
    kind: str
    mode: str
    bits: int
    group_size: int | None
    shape: tuple[int, ...]
    nbytes: int


class ClassSummary(Struct, frozen=True, rename={"kind": "class", "nbytes": "bytes"}):
    """The tensors of one class and code."""

    kind: str
    mode: str
    bits: int
    group_size: int | None
    tensors: int
    weights: int
    nbytes: int
    bits_per_weight: float
    shapes: tuple[tuple[int, ...], ...]


class InspectionSummary(Struct, frozen=True, omit_defaults=True):
    """What a model folder holds; `tensors` only where every tensor was asked for."""

    model: str
    model_type: str
    layers: int
    attention_layers: int
    hidden_size: int
    vocab_size: int
    context: int
    weights: int
    total_bytes: int
    bits_per_weight: float
    tensor_count: int
    classes: tuple[ClassSummary, ...]
    repairs: tuple[str, ...]
    notices: tuple[str, ...]
    experts: int = 0
    experts_per_token: int = 0
    tensors: tuple[TensorSummary, ...] | None = None
