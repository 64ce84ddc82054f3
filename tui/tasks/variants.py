"""A model whose quality was measured before, as a point of size against quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..text.report import Plot, Point

GB = 10**9
AXES = ("GB", "mean KL (nats)")


@dataclass(frozen=True)
class Variant:
    """A model with the bytes of its weights, and its mean KL divergence from `reference`, in nats."""

    folder: str
    name: str
    nbytes: int
    kl_mean: float
    reference: str

    @property
    def point(self) -> Point:
        return Point(self.nbytes / GB, self.kl_mean, self.name)


def plot_variants(variants: Sequence[Variant], source: str) -> tuple[Plot, ...]:
    """Plot what was measured against the model named `source`; a single point is not plotted."""
    points = [one.point for one in variants if Path(one.reference).name == source.rpartition("/")[2]]
    return (Plot(points, *AXES),) if len(points) > 1 else ()
