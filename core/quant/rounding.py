"""Packs float matrices; groups with known importances are rounded to suit them.

An affine group gets the scale and bias with the least sum_j importance_j (w_j - scale q_j - bias)^2, of MLX's
own and those found from there by alternating between codes and scales. Scales keep the variance of the group:
least squares would shrink it, which has a smaller error but gives a worse model. A group of a float code gets
the best of MLX's own scale and a few others that the code can hold.
"""

from collections.abc import Iterator

from ..checkpoint.packed import Geometry, Packed
from ..errors import UsageError
from ..machine.backend import mx, on_gpu
from .codes import nearest_levels, neighbouring_scales, pack_levels, read_scales, store_scales
from .recipe_file import RoundingMethod

CHUNK_WEIGHTS = 1 << 20  # a chunk's float32 intermediates together take about 50 MB
# by bits: the shares of MLX's range to start from, and the rounds from each; fine codes need few
SEARCH = {2: ((1.0, 0.8), 3), 3: ((1.0, 0.8), 3), 4: ((1.0, 0.8), 3), 5: ((1.0,), 3)}
SEARCH_FINE = ((1.0,), 2)


def quantize(
    weight: mx.array,
    geometry: Geometry,
    importance: mx.array | None = None,
    dtype: mx.Dtype = mx.bfloat16,
    method: RoundingMethod | None = None,
) -> Packed:
    """Pack `weight` [N, K] or [E, N, K] of any float dtype, in chunks of rows.

    `importance` is E[x^2] by input channel, [K] or [E, K]. Affine scales and biases are in `dtype`. Without a
    `method` importances steer affine codes, and MLX rounds the rest. "nearest" is MLX everywhere, any other
    method searches the best scales of every code; without importances all weights of a group count alike.
    Raises UsageError if the shapes do not match.
    """
    _check(weight, geometry, importance)
    if _leaves_to_mlx(method, geometry) or (method is None and importance is None):
        return _quantize_with_mlx(weight, geometry, dtype)
    if importance is None:
        importance = mx.ones(weight.shape[-1])
    rows = importance.astype(mx.float32).reshape(-1, weight.shape[-1])
    matrices = weight[None] if weight.ndim == 2 else weight
    parts = [
        part
        for matrix, row in zip(matrices, _rows_per_matrix(rows, len(matrices)), strict=True)
        for part in _chunks(matrix, row[None], geometry, dtype)
    ]
    words, scales, *biases = (
        mx.concatenate(list(arrays)).reshape(*weight.shape[:-1], -1) for arrays in zip(*parts, strict=True)
    )
    return Packed(
        words, scales, biases[0] if biases else None, geometry.group_size, geometry.bits, geometry.mode
    )


def rounding_error(
    weight: mx.array, importance: mx.array, geometry: Geometry, method: RoundingMethod | None = None
) -> mx.array:
    """The sum over `weight` [R, K] of importance (w - Q(w))^2, [] float32, with Q as in `quantize`.

    `importance` is [R, K] or [1, K]. Works on all rows at once; the caller bounds R.
    """
    weight = weight.astype(mx.float32)
    if not _leaves_to_mlx(method, geometry):
        groups = Groups(_in_groups(weight, geometry), _in_groups(importance, geometry), geometry)
        return groups.error(*groups.search(mx.bfloat16)).sum()
    back = _quantize_with_mlx(weight, geometry, mx.bfloat16).dequantize(mx.float32)
    return (importance * mx.square(weight - back)).sum()


def _leaves_to_mlx(method: RoundingMethod | None, geometry: Geometry) -> bool:
    """Whether MLX rounds even where importances are known."""
    return method == "nearest" or (method is None and geometry.mode != "affine")


def _check(weight: mx.array, geometry: Geometry, importance: mx.array | None) -> None:
    if weight.ndim not in (2, 3) or weight.shape[-1] % geometry.group_size:
        raise UsageError(f"a tensor of shape {list(weight.shape)} cannot be packed as {geometry}")
    *stack, _, columns = weight.shape
    if importance is not None and importance.shape not in ((columns,), (*stack, columns)):
        raise UsageError(
            f"importances of shape {list(importance.shape)} do not fit a weight of {list(weight.shape)}"
        )


def _quantize_with_mlx(weight: mx.array, geometry: Geometry, dtype: mx.Dtype) -> Packed:
    # rounded to `dtype` first, the ends of each group's range are numbers that its scale and bias can reach
    words, scales, *biases = mx.quantize(
        weight.astype(dtype), geometry.group_size, geometry.bits, mode=geometry.mode
    )
    return Packed(
        words, scales, biases[0] if biases else None, geometry.group_size, geometry.bits, geometry.mode
    )


def _rows_per_matrix(rows: mx.array, matrices: int) -> list[mx.array]:
    return list(mx.broadcast_to(rows, (matrices, rows.shape[-1])))


def _chunks(
    matrix: mx.array, importance: mx.array, geometry: Geometry, dtype: mx.Dtype
) -> Iterator[tuple[mx.array, ...]]:
    """Yield words, scales and affine biases of runs of rows, evaluated; on a CPU two runs in parallel."""
    step = max(1, CHUNK_WEIGHTS // matrix.shape[-1])
    starts = range(0, len(matrix), step)
    streams = rounding_streams()
    for first in range(0, len(starts), len(streams)):
        batch = []
        for start, stream in zip(starts[first:], streams, strict=False):
            with mx.stream(stream):
                batch.append(_pack_rows(matrix[start : start + step], importance, geometry, dtype))
        mx.eval(batch)
        yield from batch


_STREAMS: list[mx.Stream] = []


def rounding_streams() -> list[mx.Stream]:
    """The streams to round on: a GPU's own, or on a CPU two.

    Those are made once: MLX never ends a stream's thread, and runs its operations one by one.
    """
    if on_gpu():
        return [mx.default_stream(mx.default_device())]
    if not _STREAMS:
        _STREAMS.extend(mx.new_stream(mx.cpu) for _ in range(2))
    return _STREAMS


def _pack_rows(
    rows: mx.array, importance: mx.array, geometry: Geometry, dtype: mx.Dtype
) -> tuple[mx.array, ...]:
    weights = _in_groups(rows.astype(mx.float32), geometry)
    groups = Groups(weights, _in_groups(importance, geometry), geometry)
    scales, biases = groups.search(dtype)
    words = pack_levels(groups.levels(scales, biases).reshape(rows.shape), geometry)
    stored = store_scales(scales[..., 0], geometry, dtype)
    return (words, stored, biases[..., 0].astype(dtype)) if geometry.mode == "affine" else (words, stored)


def _in_groups(rows: mx.array, geometry: Geometry) -> mx.array:
    """Rows [R, K] cut in groups [R, K/G, G]."""
    return rows.reshape(len(rows), -1, geometry.group_size)


class Groups:
    """Float32 weights [..., G] of groups, with importances that broadcast to them.

    Scales and biases are [..., 1] float32; the biases of float codes are 0.
    """

    def __init__(self, weights: mx.array, importance: mx.array, geometry: Geometry):
        self.weights, self.importance, self.geometry = weights, importance, geometry

    def search(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The best scales and biases found, never worse than MLX's own; affine ones exact in `dtype`."""
        scales, biases = self._start(dtype)
        if self.geometry.mode == "affine":
            candidates = self._matched(scales, biases, dtype)
        else:
            others = neighbouring_scales(scales, self.weights, self.geometry)
            candidates = ((other, biases) for other in others)
        best, error = (scales, biases), self.error(scales, biases)
        for found in candidates:
            reached = self.error(*found)
            better = reached < error
            error = mx.where(better, reached, error)
            best = mx.where(better, found[0], best[0]), mx.where(better, found[1], best[1])
        return best

    def levels(self, scales: mx.array, biases: mx.array) -> mx.array:
        """The levels of the code nearest to the weights."""
        return nearest_levels((self.weights - biases) * mx.where(scales == 0, 0.0, 1 / scales), self.geometry)

    def error(self, scales: mx.array, biases: mx.array) -> mx.array:
        """The weighted error that is minimised, [..., 1]."""
        rest = self.weights - (scales * self.levels(scales, biases) + biases)
        return (self.importance * mx.square(rest)).sum(axis=-1, keepdims=True)

    def _start(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """MLX's own scales and biases."""
        packed = _quantize_with_mlx(self.weights, self.geometry, dtype)
        scales = read_scales(packed.scales, self.geometry)
        return scales, mx.zeros_like(scales) if packed.biases is None else packed.biases.astype(mx.float32)

    def _matched(
        self, scales: mx.array, biases: mx.array, dtype: mx.Dtype
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """Scales and biases that keep mean and variance, from several shares of MLX's range."""
        parts, rounds = SEARCH.get(self.geometry.bits, SEARCH_FINE)
        top = 2**self.geometry.bits - 1
        middle = biases + scales * top / 2
        moments = _Moments(self.weights, self.importance)
        for part in parts:
            found = scales * part, middle - scales * part * top / 2
            for _ in range(rounds):
                found = moments.match(found[0], self.levels(*found), dtype)
            yield found


class _Moments:
    """Weighted mean and variance of each group, [..., 1]."""

    def __init__(self, weights: mx.array, importance: mx.array):
        self.importance = importance
        # a group that no token reads has no importance at all
        self.total = mx.maximum(importance.sum(axis=-1, keepdims=True), mx.finfo(mx.float32).smallest_normal)
        self.mean = (importance * weights).sum(axis=-1, keepdims=True) / self.total
        squares = (importance * mx.square(weights - self.mean)).sum(axis=-1, keepdims=True)
        self.variance = squares / self.total

    def match(self, scales: mx.array, codes: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Scales and biases, exact in `dtype`, that give the codes the weights' mean and variance."""
        weighted = self.importance * codes
        mean = weighted.sum(axis=-1, keepdims=True) / self.total
        variance = (weighted * codes).sum(axis=-1, keepdims=True) / self.total - mean * mean
        spread = variance > 1e-6  # else all weights that count have the same code
        ratio = mx.sqrt(self.variance / mx.where(spread, variance, 1.0))
        scales = mx.where(spread, mx.sign(scales) * ratio, scales).astype(dtype).astype(mx.float32)
        return scales, (self.mean - scales * mean).astype(dtype).astype(mx.float32)
