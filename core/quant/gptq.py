"""Rounding that compensates its errors (GPTQ, arXiv 2210.17323), in MLX's own groups.

With H = X^T X of a matrix's inputs, an error in one column of a row is made up for by the columns after it.
H = R R^T with R upper triangular: the error of the outputs is |(W - Q) R|^2, and taking the columns in order
each cancels what the ones before it left there. A group's scale and bias are found when the group is reached,
from columns that are already compensated. Refuses no H: one that cannot be factorised is damped further.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from ..checkpoint.packed import Geometry, Packed
from ..machine.backend import mx
from .codes import nearest_levels, pack_levels, store_scales
from .rounding import Groups, rounding_streams

DAMPING = 0.05  # of the mean diagonal of H, added to it: the best of 0.01, 0.05 and 0.2 in measurements
MORE_DAMPING = (1, 10, 100)
# rows that a part needs to be worth a stream of its own
MIN_ROWS = 64
BLOCK = 1024  # rows of an H at once; a multiple of every group


@dataclass(frozen=True)
class Factor:
    """R of one H, or of one for each expert, and the diagonal of H.

    `rows` are the lower half of R with both axes reversed, as Cholesky gives it for the reversed H, in blocks
    of BLOCK rows: [E, n, end] with `end` the row after the last. `diagonal` is [E, K]. All float32.
    """

    rows: list[mx.array]
    diagonal: mx.array

    def above(self, begin: int, end: int) -> mx.array:
        """R[:begin, begin:end], [E, begin, end - begin]."""
        experts, size = self.diagonal.shape
        first, last = size - end, size - begin
        parts = [
            row[:, max(last - start, 0) :, first:last]
            for start, row in zip(range(0, size, BLOCK), self.rows, strict=True)
            if row.shape[-1] > last
        ]
        return mx.concatenate(parts, axis=1)[:, ::-1, ::-1] if parts else mx.zeros((experts, 0, last - first))

    def inverse(self, begin: int, end: int) -> mx.array:
        """The inverse of R[begin:end, begin:end], upper triangular."""
        size = self.diagonal.shape[-1]
        first, last = size - end, size - begin
        start = first // BLOCK * BLOCK
        block = self.rows[first // BLOCK][:, first - start : last - start, first:last]
        return mx.linalg.tri_inv(block, stream=mx.cpu)[:, ::-1, ::-1]


def cut_lower(matrix: mx.array) -> list[mx.array]:
    """Return the lower half of [E, K, K] as `factorise` takes it."""
    size = matrix.shape[-1]
    ends = [min(start + BLOCK, size) for start in range(0, size, BLOCK)]
    return [matrix[:, start:end, :end] for start, end in zip(range(0, size, BLOCK), ends, strict=True)]


def factorise(rows: Sequence[mx.array]) -> Factor:
    """The factor of H float32, damped, and evaluated.

    `rows` are the lower half of H with both axes reversed, in blocks of BLOCK rows: [E, n, end] with `end`
    the row after the last. No array has the size of a whole H.
    """
    corners = [row[..., row.shape[-1] - row.shape[-2] :] for row in rows]
    diagonal = mx.concatenate([mx.diagonal(corner, axis1=-2, axis2=-1) for corner in corners], axis=-1)
    mean = diagonal.mean(axis=-1)
    damping = mx.where(mean > 0, mean * DAMPING, 1.0)  # where nothing was ever read, too
    lower: list[mx.array] = []
    for more in MORE_DAMPING:
        lower = _cholesky(rows, damping * more)
        if all(_is_whole(row) for row in lower):
            break
    factor = Factor(lower, diagonal[:, ::-1])
    mx.eval(factor.diagonal)
    return factor


def _cholesky(rows: Sequence[mx.array], damping: mx.array) -> list[mx.array]:
    """Cholesky's factor of H with `damping` [E] on its diagonal, in blocks of rows as those of H."""
    done: list[mx.array] = []
    inverses: list[mx.array] = []  # of the blocks on the diagonal, transposed
    for row in rows:
        count, end = row.shape[-2:]
        left = mx.zeros((*row.shape[:-1], 0))
        for start, other, inverse in zip(range(0, end, BLOCK), done, inverses, strict=False):
            rest = row[..., start : start + BLOCK] - left @ other[..., :start].swapaxes(-1, -2)
            left = mx.concatenate([left, rest @ inverse], axis=-1)
            mx.eval(left)
        corner = (
            row[..., end - count :] + damping[:, None, None] * mx.eye(count) - left @ left.swapaxes(-1, -2)
        )
        corner = mx.linalg.cholesky(corner, stream=mx.cpu)
        inverses.append(mx.linalg.tri_inv(corner, stream=mx.cpu).swapaxes(-1, -2))
        done.append(mx.concatenate([left, corner], axis=-1))
        mx.eval(done[-1], inverses[-1])
    return done


def _is_whole(row: mx.array) -> bool:
    """Whether rows of a factor [E, n, end] are finite, and their pivots above 0."""
    pivots = mx.diagonal(row[..., row.shape[-1] - row.shape[-2] :], axis1=-2, axis2=-1)
    return bool((mx.isfinite(row).all() & (pivots > 0).all()).item())


def compensate(weight: mx.array, geometry: Geometry, factor: Factor, dtype: mx.Dtype = mx.bfloat16) -> Packed:
    """Pack `weight` [N, K], or [E, N, K] with a factor for each expert; evaluated."""
    stack = weight.astype(mx.float32)
    stack = stack[None] if weight.ndim == 2 else stack
    streams = rounding_streams()
    step = max(MIN_ROWS, -(-stack.shape[1] // len(streams)))
    parts = [_Part(stack[:, i : i + step], geometry, dtype) for i in range(0, stack.shape[1], step)]
    for begin in range(0, stack.shape[-1], geometry.group_size):
        end = begin + geometry.group_size
        above, inverse = factor.above(begin, end), factor.inverse(begin, end)
        mx.eval(above, inverse)
        importance = factor.diagonal[:, None, begin:end]
        for part, stream in zip(parts, cycle(streams), strict=False):
            with mx.stream(stream):
                part.round(begin, end, above, inverse, importance)
        mx.eval([part.latest for part in parts])
    return _join(parts, weight.shape[:-1], geometry)


def _join(parts: Sequence["_Part"], rows: tuple[int, ...], geometry: Geometry) -> Packed:
    levels, scales, biases = (
        mx.concatenate([mx.concatenate(getattr(part, name), axis=-1) for part in parts], axis=1)
        for name in ("levels", "scales", "biases")
    )
    packed = Packed(
        pack_levels(levels, geometry).reshape(*rows, -1),
        scales.reshape(*rows, -1),
        biases.reshape(*rows, -1) if geometry.mode == "affine" else None,
        geometry.group_size,
        geometry.bits,
        geometry.mode,
    )
    mx.eval(packed.arrays)
    return packed


class _Part:
    """Some rows [E, N, K] on their way, which are rounded with columns along the second axis: [E, G, N]."""

    def __init__(self, weight: mx.array, geometry: Geometry, dtype: mx.Dtype):
        self.weight, self.geometry, self.dtype = weight, geometry, dtype
        self.changes: list[mx.array] = []  # W - Q of each group, [E, G, N]
        self.levels: list[mx.array] = []
        self.scales: list[mx.array] = []
        self.biases: list[mx.array] = []

    @property
    def latest(self) -> list[mx.array]:
        return [self.changes[-1], self.levels[-1], self.scales[-1], self.biases[-1]]

    def round(self, begin: int, end: int, above: mx.array, inverse: mx.array, importance: mx.array) -> None:
        """Round the columns from `begin` to `end`, one group, given the changes of those before it."""
        own = self.weight[..., begin:end].swapaxes(-1, -2)  # [E, G, N]
        target = own
        if self.changes:
            left = above.swapaxes(-1, -2) @ mx.concatenate(self.changes, axis=1)
            target = own + inverse.swapaxes(-1, -2) @ left
        groups = Groups(target.swapaxes(-1, -2), importance, self.geometry)
        scales, biases = groups.search(self.dtype)  # [E, N, 1]
        code = _Code(scales.swapaxes(-1, -2), biases.swapaxes(-1, -2), self.geometry)
        levels, _ = code.descend(target, inverse)
        self.changes.append(own - code.values(levels))
        self.levels.append(levels.swapaxes(-1, -2))
        self.scales.append(store_scales(scales, self.geometry, self.dtype))
        self.biases.append(biases.astype(self.dtype))


@dataclass(frozen=True)
class _Code:
    """The code of one group of columns: scales and biases [E, 1, N]."""

    scales: mx.array
    biases: mx.array
    geometry: Geometry

    def levels(self, weights: mx.array) -> mx.array:
        inverse = mx.where(self.scales == 0, 0.0, 1 / self.scales)
        return nearest_levels((weights - self.biases) * inverse, self.geometry)

    def values(self, levels: mx.array) -> mx.array:
        return levels * self.scales + self.biases

    def descend(self, target: mx.array, inverse: mx.array) -> tuple[mx.array, mx.array]:
        """Levels for `target` [E, G, N], and what is left of the error at each column's place in the outputs.

        `inverse` [E, G, G] is upper triangular. The second half waits for the first.
        """
        count = target.shape[1]
        if count == 1:
            levels = self.levels(target)
            return levels, (target - self.values(levels)) / inverse
        half = count // 2
        first, left = self.descend(target[:, :half], inverse[:, :half, :half])
        later = target[:, half:] - inverse[:, :half, half:].swapaxes(-1, -2) @ left
        second, right = self.descend(later, inverse[:, half:, half:])
        return mx.concatenate([first, second], axis=1), mx.concatenate([left, right], axis=1)
