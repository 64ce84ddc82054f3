"""Packs float matrices; affine groups with known importances are rounded to suit them.

A group gets the scale and bias with the least sum_j importance_j (w_j - scale q_j - bias)^2, of MLX's own and
those found from there by alternating between codes and scales. Scales keep the variance of the group: least
squares would shrink it, which has a smaller error but gives a worse model.
"""

from collections.abc import Iterator

from ..checkpoint.packed import Geometry, Packed
from ..errors import UsageError
from ..machine.backend import mx, on_gpu

CHUNK_WEIGHTS = 1 << 20  # a chunk's float32 intermediates together take about 50 MB
# by bits: the shares of MLX's range to start from, and the rounds from each; fine codes need few
SEARCH = {2: ((1.0, 0.8), 3), 3: ((1.0, 0.8), 3), 4: ((1.0, 0.8), 3), 5: ((1.0,), 3)}
SEARCH_FINE = ((1.0,), 2)
WORD_BITS = 32


def quantize(
    weight: mx.array, geometry: Geometry, importance: mx.array | None = None, dtype: mx.Dtype = mx.bfloat16
) -> Packed:
    """Pack `weight` [N, K] or [E, N, K] of any float dtype, in chunks of rows.

    `importance` is E[x^2] by input channel, [K] or [E, K]; MLX rounds without it, and to float codes. Affine
    scales and biases are in `dtype`. Raises UsageError if the shapes do not match.
    """
    _check(weight, geometry, importance)
    if importance is None or geometry.mode != "affine":
        return _quantize_with_mlx(weight, geometry, dtype)
    rows = importance.astype(mx.float32).reshape(-1, weight.shape[-1])
    matrices = weight[None] if weight.ndim == 2 else weight
    parts = [
        part
        for matrix, row in zip(matrices, _rows_per_matrix(rows, len(matrices)), strict=True)
        for part in _chunks(matrix, row[None], geometry, dtype)
    ]
    shape = (*weight.shape[:-1], -1)
    words, scales, biases = (
        mx.concatenate(list(arrays)).reshape(shape) for arrays in zip(*parts, strict=True)
    )
    return Packed(words, scales, biases, geometry.group_size, geometry.bits, geometry.mode)


def rounding_error(weight: mx.array, importance: mx.array, geometry: Geometry) -> mx.array:
    """The sum over `weight` [R, K] of importance (w - Q(w))^2, [] float32, with Q as in `quantize`.

    `importance` is [R, K] or [1, K]. Works on all rows at once; the caller bounds R.
    """
    weight = weight.astype(mx.float32)
    if geometry.mode == "affine":
        groups = _Groups(weight, importance, geometry)
        return groups.error(*groups.search(*groups.start(mx.bfloat16), mx.bfloat16)).sum()
    back = _quantize_with_mlx(weight, geometry, mx.bfloat16).dequantize(mx.float32)
    return (importance * mx.square(weight - back)).sum()


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
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """Yield words, scales and biases of runs of rows, evaluated; on a CPU two runs in parallel."""
    step = max(1, CHUNK_WEIGHTS // matrix.shape[-1])
    starts = range(0, len(matrix), step)
    streams = [mx.default_stream(mx.default_device())] if on_gpu() else _cpu_streams()
    for first in range(0, len(starts), len(streams)):
        batch = []
        for start, stream in zip(starts[first:], streams, strict=False):
            with mx.stream(stream):
                batch.append(_pack_rows(matrix[start : start + step], importance, geometry, dtype))
        mx.eval(batch)
        yield from batch


_STREAMS: list[mx.Stream] = []


def _cpu_streams() -> list[mx.Stream]:
    """Two streams, made once: MLX never ends a stream's thread, and runs its operations one by one."""
    if not _STREAMS:
        _STREAMS.extend(mx.new_stream(mx.cpu) for _ in range(2))
    return _STREAMS


def _pack_rows(
    rows: mx.array, importance: mx.array, geometry: Geometry, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    groups = _Groups(rows.astype(mx.float32), importance, geometry)
    scales, biases = groups.search(*groups.start(dtype), dtype)
    words = pack(groups.codes(scales, biases).reshape(rows.shape), geometry.bits)
    return words, scales[..., 0].astype(dtype), biases[..., 0].astype(dtype)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., K] below 2^bits as MLX packs them: little-endian bits in u32 [..., K * bits / 32]."""
    values = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, WORD_BITS)
    words = [mx.zeros(values.shape[:-1], mx.uint32) for _ in range(bits)]
    for i in range(WORD_BITS):
        word, shift = divmod(i * bits, WORD_BITS)
        words[word] = words[word] | (values[..., i] << shift)
        if shift + bits > WORD_BITS:
            words[word + 1] = words[word + 1] | (values[..., i] >> (WORD_BITS - shift))
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)


class _Groups:
    """Float32 rows [R, K] cut in groups [R, K/G, G]; scales and biases are [R, K/G, 1] float32."""

    def __init__(self, rows: mx.array, importance: mx.array, geometry: Geometry):
        self.geometry = geometry
        self.top = 2**geometry.bits - 1
        self.rows = rows
        shape = (-1, rows.shape[-1] // geometry.group_size, geometry.group_size)
        self.weights, self.importance = rows.reshape(shape), importance.reshape(shape)
        total = self.importance.sum(axis=-1, keepdims=True)
        self.total = mx.maximum(
            total, mx.finfo(mx.float32).smallest_normal
        )  # for a group that no token reads
        self.mean = (self.importance * self.weights).sum(axis=-1, keepdims=True) / self.total
        squares = (self.importance * mx.square(self.weights - self.mean)).sum(axis=-1, keepdims=True)
        self.variance = squares / self.total

    def start(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """MLX's own scales and biases."""
        packed = _quantize_with_mlx(self.rows, self.geometry, dtype)
        biases = packed.scales if packed.biases is None else packed.biases
        return packed.scales.astype(mx.float32)[..., None], biases.astype(mx.float32)[..., None]

    def search(self, scales: mx.array, biases: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The best scales and biases found when starting from these, never worse than these."""
        parts, rounds = SEARCH.get(self.geometry.bits, SEARCH_FINE)
        best, error = (scales, biases), self.error(scales, biases)
        middle = biases + scales * self.top / 2
        for part in parts:
            found = scales * part, middle - scales * part * self.top / 2
            for _ in range(rounds):
                found = self._match_moments(*found, dtype)
            reached = self.error(*found)
            better = reached < error
            error = mx.where(better, reached, error)
            best = mx.where(better, found[0], best[0]), mx.where(better, found[1], best[1])
        return best

    def codes(self, scales: mx.array, biases: mx.array) -> mx.array:
        inverse = mx.where(scales == 0, 0.0, 1 / scales)
        return mx.clip(mx.round((self.weights - biases) * inverse), 0, self.top)

    def error(self, scales: mx.array, biases: mx.array) -> mx.array:
        """The weighted error that is minimised, [R, K/G, 1]."""
        rest = self.weights - (scales * self.codes(scales, biases) + biases)
        return (self.importance * mx.square(rest)).sum(axis=-1, keepdims=True)

    def _match_moments(
        self, scales: mx.array, biases: mx.array, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        """Scales and biases, exact in `dtype`, that give the codes the weights' mean and variance."""
        codes = self.codes(scales, biases)
        weighted = self.importance * codes
        mean = weighted.sum(axis=-1, keepdims=True) / self.total
        variance = (weighted * codes).sum(axis=-1, keepdims=True) / self.total - mean * mean
        spread = variance > 1e-6  # else all weights that count have the same code
        ratio = mx.sqrt(self.variance / mx.where(spread, variance, 1.0))
        scales = mx.where(spread, mx.sign(scales) * ratio, scales).astype(dtype).astype(mx.float32)
        return scales, (self.mean - scales * mean).astype(dtype).astype(mx.float32)
