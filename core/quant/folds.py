"""Scales moved between tensors without changing the model: columns times s, the tensor before them over s.

Owns how the scales apply to each tensor, and the report of the changes. `awq` finds the scales.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..machine.backend import mx
from .imatrix import Imatrix
from .results import GroupReport


@dataclass(frozen=True)
class Folds:
    """The scales of one model by canonical tensor name; without any, every tensor stays unchanged.

    `columns` are [K] or [E, K] and multiply inputs; `rows` are [N] or [E, N] and divide outputs, or the
    elements of a norm. All float32.
    """

    imatrix: Imatrix | None = None
    columns: Mapping[str, mx.array] = field(default_factory=dict)
    rows: Mapping[str, mx.array] = field(default_factory=dict)
    report: tuple[GroupReport, ...] = ()

    def apply(self, name: str, weight: mx.array) -> mx.array:
        """Apply the scales of the tensor `name`: a float32 array, or `weight` itself if there are none.

        `weight` is [K] (norms as factors of x: 1 + w), [N, K] or [E, N, K], of any float dtype.
        """
        columns, rows = self.columns.get(name), self.rows.get(name)
        if columns is None and rows is None:
            return weight
        folded = weight.astype(mx.float32)
        if columns is not None:
            folded = folded * columns[..., None, :]
        if rows is not None:
            folded = folded / (rows if folded.ndim == 1 else rows[..., None])
        return folded

    def importance(self, name: str) -> mx.array | None:
        """E[x^2] per input channel of the folded tensor `name`, float32 [K] or [E, K]; None if unknown."""
        known = None if self.imatrix is None else self.imatrix.importance(name)
        columns = self.columns.get(name)
        return known if known is None or columns is None else known / mx.square(columns)

    def as_json(self) -> list[dict[str, Any]]:
        """The report as values that `json.dumps` takes."""
        return [vars(group) for group in self.report]
