"""The report of a conversion, as JSON and as lines for a terminal. `card` makes the model card of it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..quant.folds import Folds
from ..quant.plan import Plan
from .verify import Check

GB = 10**9
MB = 10**6


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
    license: str | None = None

    @property
    def speed(self) -> str:
        """The speed of writing in bytes of the source; a remark for a run that found all shards finished."""
        if not self.weights_nbytes:
            return "all shards were there already"
        return f"{self.weights_nbytes / MB / self.seconds:.0f} MB of bfloat16 a second"

    def as_json(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes."""
        return {
            "name": self.name,
            "source": self.source,
            "command": self.command,
            "options": {**vars(self.plan.options), "recipe": Path(self.plan.options.recipe).name},
            "nbytes": self.nbytes,
            "bits_per_weight": self.plan.total.bits_per_weight,
            "seconds": self.seconds,
            "total_seconds": self.total_seconds,
            "kept_shards": self.kept_shards,
            "warnings": list(self.warnings),
            "repairs": list(self.repairs),
            "notes": list(self.plan.notes),
            "awq": self.folds.as_json(),
            "check": asdict(self.check),
        }

    def as_text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.name}: {self.nbytes / GB:.3f} GB, {self.plan.total.bits_per_weight:.2f} bits per weight",
            f"written in {self.seconds:.1f} s ({self.speed}), {self.total_seconds:.1f} s with all checks",
            self.check.as_text(),
        ]
        if self.kept_shards:
            lines.append(f"{self.kept_shards} shards were finished by an earlier run")
        if self.folds.report:
            changed = sum(group.changed for group in self.folds.report)
            lines.append(f"AWQ changed {changed} of {len(self.folds.report)} groups: the card lists them")
        return "\n".join((*lines, *self.plan.notes))
