"""Confidence intervals of means over tokens, by bootstrap.

Neighbouring tokens fail together, so that stretches of text are drawn, not single tokens. Two models that
read the same text are compared token by token: the interval of their difference is far narrower than theirs.
"""

from collections.abc import Sequence

from ..machine.backend import mx
from .results import Interval

STRETCH = 32  # tokens, or more where there would be too many stretches
MOST_STRETCHES = 4096
DRAWS = 1000
TAIL = 0.025  # outside on each side


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean of `values`, one per token in the order of the text."""
    sums, tokens = _stretches(values)
    drawn = mx.random.randint(0, len(tokens), (DRAWS, len(tokens)), key=mx.random.key(0))
    means = mx.sort(sums[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    low, high = round(TAIL * (DRAWS - 1)), round((1 - TAIL) * (DRAWS - 1))
    return float(means[low]), float(means[high])


def difference_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean of `values` less that of `others`, both of the same tokens."""
    return mean_interval([value - other for value, other in zip(values, others, strict=True)])


def _stretches(values: Sequence[float]) -> tuple[mx.array, mx.array]:
    """Return the sums of all stretches [N], and their tokens [N]; the last one may be shorter."""
    length = max(STRETCH, -(-len(values) // MOST_STRETCHES))
    starts = range(0, len(values), length)
    sums = [sum(values[begin : begin + length]) for begin in starts]
    tokens = [min(length, len(values) - begin) for begin in starts]
    return mx.array(sums, mx.float32), mx.array(tokens, mx.float32)
