"""Products of experts whose weights are narrower than the activations, cast a few experts at a time.

For work on layers that fill the memory; it evaluates as it goes.
"""

from ..machine.backend import mx
from .linear import ExpertsLinear, Weight

TILE_NBYTES = 128 << 20  # of weights in float32 that are cast at once


class TiledExperts:
    """`ExpertsLinear` a few experts at a time, whose weights alone are cast to the activations' dtype."""

    def __init__(self, weight: Weight):
        self.weight = weight

    def __call__(self, x: mx.array, index: mx.array, ordered: bool) -> mx.array:
        """Map x [R, 1, K] and index [R] to [R, 1, N]; `ordered` promises that index is sorted."""
        weight = self.weight
        if not isinstance(weight, mx.array) or weight.dtype == x.dtype or not ordered:
            return ExpertsLinear(weight)(x, index, ordered)
        experts, rows, columns = weight.shape
        step = max(1, TILE_NBYTES // (4 * rows * columns))
        firsts = range(0, experts, step)
        ends = [int((index < first + step).sum()) for first in firsts]
        parts = []
        for first, begin, end in zip(firsts, [0, *ends], ends, strict=False):
            if begin < end:
                tile = ExpertsLinear(weight[first : first + step])
                parts.append(tile(x[begin:end], index[begin:end] - first, ordered))
                mx.eval(parts[-1])  # so that the cast weights can go
        return mx.concatenate(parts)
