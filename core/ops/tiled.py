"""Products with weights that are packed or narrower than the activations, a tile of weights at a time.

For work on layers that fill the memory: MLX's graph of a whole layer would hold all of its dense weights.
They evaluate as they go.
"""

from ..checkpoint.packed import Packed
from ..machine.backend import mx
from .linear import ExpertsLinear, Weight, cut_weight

TILE_NBYTES = 128 << 20  # of weights in float32 that are made at once


class TiledLinear:
    """x @ W^T for one weight [N, K]."""

    def __init__(self, weight: Weight):
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., K] to [..., N], evaluated."""
        rows = len(self.weight if isinstance(self.weight, mx.array) else self.weight.weight)
        step = max(1, TILE_NBYTES // (4 * x.shape[-1]))
        bounds = [*range(0, rows, step), rows]
        parts = []
        for tile in cut_weight(self.weight, bounds):
            dense = tile.dequantize(x.dtype) if isinstance(tile, Packed) else tile.astype(x.dtype)
            parts.append(x @ dense.T)
            mx.eval(parts[-1])  # so that the dense weights can go
        return mx.concatenate(parts, axis=-1)


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
