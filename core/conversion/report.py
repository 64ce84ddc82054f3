"""The report of a conversion. `card` makes the model card of it, `results` has what is told of it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..quant.folds import Folds
from ..quant.plan import Plan
from ..quant.results import AllocationSummary
from .results import Check, ConversionSummary, RoundingSummary


@dataclass(frozen=True)
class Report:
    """What one conversion did.

    `nbytes` is the size of the weight files; `weights_nbytes` is the bfloat16 size of the weights that this
    run wrote. `seconds` is the time of writing; `total_seconds` includes the scaling search and all checks.
    `kept_shards` counts shards that an earlier run had finished.
    """

    name: str
    source: str
    command: str
    plan: Plan
    vision: bool
    nbytes: int
    weights_nbytes: int
    seconds: float
    total_seconds: float
    kept_shards: int
    warnings: tuple[str, ...]
    repairs: tuple[str, ...]
    folds: Folds
    check: Check
    rounding: RoundingSummary | None = None
    importances: tuple[str, ...] = ()
    license: str | None = None
    allocation: AllocationSummary | None = None

    def summary(self) -> ConversionSummary:
        """Return what there is to tell of it."""
        return ConversionSummary(
            name=self.name,
            source=self.source,
            command=self.command,
            options={**vars(self.plan.options), "recipe": Path(self.plan.options.recipe).name},
            nbytes=self.nbytes,
            bits_per_weight=self.plan.total.bits_per_weight,
            weights_nbytes=self.weights_nbytes,
            seconds=self.seconds,
            total_seconds=self.total_seconds,
            kept_shards=self.kept_shards,
            warnings=self.warnings,
            repairs=self.repairs,
            notes=self.plan.notes,
            awq=self.folds.report,
            check=self.check,
            allocation=self.allocation,
            rounding=self.rounding,
            importances=self.importances,
        )

    def as_json(self) -> dict[str, Any]:
        """Return `summary` as values that `json.dumps` takes."""
        return asdict(self.summary())
