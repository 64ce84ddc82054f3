"""Scores of a model's predictions: perplexity, divergence from a reference's, and how often both agree.

All figures are accumulated token by token in float64; arrays of logits are float32. In nats.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest

from ..machine.backend import mx
from ..ops.linear import Linear
from .bootstrap import mean_interval
from .results import Score

SUM_WIDTH = 256  # entries of a row of logits that are summed by themselves
TOP_SHARE = 0.99
MOST_FLIPS = 20  # that are kept


@dataclass(frozen=True)
class Window:
    """Consecutive ids of one text; every id but the first is predicted from the earlier ones here."""

    kind: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class WindowOutputs:
    """A model's hidden states [T, hidden] of one window, and the head that maps them to logits [T, V]."""

    head: Linear
    hidden: mx.array

    def predict(self, begin: int, end: int) -> "Predictions":
        """Compute the predictions after the ids from `begin` to `end`."""
        return Predictions(self.head(self.hidden[None, begin:end])[0])


class Predictions:
    """The distributions given by logits [T, V] of any float dtype, in float32.

    Stores x - max x, its exponential, and the sum of that [T, 1]. Losses and divergences have an absolute
    error of about 1e-6 nats at 250,000 entries.
    """

    def __init__(self, logits: mx.array):
        logits = logits.astype(mx.float32)
        self._shifted = logits - logits.max(axis=-1, keepdims=True)
        self._exps = mx.exp(self._shifted)
        self._total = _row_sums(self._exps)

    def losses(self, targets: mx.array) -> mx.array:
        """Compute the negative log-likelihood [T] of the ids `targets` [T], in nats."""
        chosen = mx.take_along_axis(self._shifted, targets[:, None], axis=-1)
        return (mx.log(self._total) - chosen)[:, 0]

    def divergence(self, other: "Predictions") -> mx.array:
        """Compute KL(self || other) = sum p (log p - log q) [T], in nats; never negative."""
        differences = _row_sums(self._exps * (self._shifted - other._shifted)) / self._total
        return mx.maximum(differences - mx.log(self._total / other._total), 0.0)[:, 0]

    def most_likely(self) -> mx.array:
        """Return the likeliest id of each row [T]."""
        return self._shifted.argmax(axis=-1)


def _row_sums(values: mx.array) -> mx.array:
    """Sum rows [T, V] to [T, 1] in two levels: adding V numbers one by one loses four digits."""
    rows, width = values.shape
    if width % SUM_WIDTH:
        values = mx.pad(values, [(0, 0), (0, -width % SUM_WIDTH)])
    return values.reshape(rows, -1, SUM_WIDTH).sum(axis=-1).sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class FlippedId:
    """A place of a window, the id after it that is likeliest to the reference, and the model's own."""

    divergence: float
    window: Window
    place: int
    reference: int
    model: int


@dataclass
class ScoreCollector:
    """Accumulates scores: losses and divergences of each token, and how often the likeliest ids agree.

    `flips` are those of the greatest divergence.
    """

    losses: array = field(default_factory=lambda: array("d"))
    reference_losses: array = field(default_factory=lambda: array("d"))
    divergences: array = field(default_factory=lambda: array("d"))
    agreed: int = 0
    flips: list[FlippedId] = field(default_factory=list)

    def __add__(self, other: "ScoreCollector") -> "ScoreCollector":
        return ScoreCollector(
            self.losses + other.losses,
            self.reference_losses + other.reference_losses,
            self.divergences + other.divergences,
            self.agreed + other.agreed,
            _worst([*self.flips, *other.flips]),
        )

    def add(self, window: Window, outputs: WindowOutputs, reference: WindowOutputs | None, rows: int) -> bool:
        """Add one window, `rows` rows of logits at a time; returns False where a figure is not finite."""
        last = len(window.ids) - 1
        for begin in range(0, last, rows):
            end = min(begin + rows, last)
            targets = mx.array(window.ids[begin + 1 : end + 1])
            predicted = outputs.predict(begin, end)
            measured = _to_floats(predicted.losses(targets))
            self.losses.extend(measured)
            if reference is not None:
                theirs = reference.predict(begin, end)
                divergences = self._compare(theirs, predicted, targets)
                self._add_flips(window, begin, theirs, predicted, divergences)
                measured += divergences
            if not all(map(math.isfinite, measured)):
                return False
        return True

    def _compare(self, reference: Predictions, predicted: Predictions, targets: mx.array) -> list[float]:
        """Add the comparison with the reference's predictions; returns the divergences."""
        divergences = _to_floats(reference.divergence(predicted))
        self.reference_losses.extend(_to_floats(reference.losses(targets)))
        self.divergences.extend(divergences)
        return divergences

    def _add_flips(
        self,
        window: Window,
        begin: int,
        reference: Predictions,
        predicted: Predictions,
        divergences: Sequence[float],
    ) -> None:
        """Compare the likeliest ids of the places from `begin` on."""
        pairs = zip(_to_ints(reference.most_likely()), _to_ints(predicted.most_likely()), strict=True)
        flips = [
            FlippedId(divergence, window, begin + offset, theirs, ours)
            for offset, (divergence, (theirs, ours)) in enumerate(zip(divergences, pairs, strict=True))
            if theirs != ours
        ]
        self.agreed += len(divergences) - len(flips)
        self.flips = _worst([*self.flips, *flips])

    def score(self, kind: str) -> Score:
        """Compute the score of everything added."""
        score = Score(kind, len(self.losses), _perplexity(self.losses))
        if not self.divergences:
            return score
        return replace(
            score,
            reference_perplexity=_perplexity(self.reference_losses),
            kl_mean=math.fsum(self.divergences) / len(self.divergences),
            kl_p99=percentile(self.divergences, TOP_SHARE),
            top1_agreement=self.agreed / len(self.divergences),
            kl_interval=mean_interval(self.divergences),
        )


def _worst(flips: Sequence[FlippedId]) -> list[FlippedId]:
    return nlargest(MOST_FLIPS, flips, key=lambda flip: flip.divergence)


def _perplexity(losses: array) -> float:
    # the largest exponent of a float: a broken model gets an absurd figure, not an error
    return math.exp(min(math.fsum(losses) / len(losses), 709.0))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of `values` are, interpolated linearly between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _to_floats(row: mx.array) -> list[float]:
    return row.tolist()  # pyright: ignore[reportReturnType]


def _to_ints(row: mx.array) -> list[int]:
    return row.tolist()  # pyright: ignore[reportReturnType]
