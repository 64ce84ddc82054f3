"""Products with weights in every stored form: dense, packed, and one per expert; `make_linear` chooses.

Weights are [N, K] (experts [E, N, K]) and a product maps x [..., K] to [..., N]. Packed forms are MLX's
triple of group_size, bits and mode. On a CPU one row goes as columns through the BLAS's small-matrix path,
and several rows of a packed weight are dequantized first, because MLX's own CPU product uses no GEMM.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Protocol

from ..backend import Policy, mx, on_gpu
from ..packed import Packed

# OpenBLAS serves m * n * k up to a million from its small-matrix kernels, at memory speed
SMALL_PRODUCT = 1_000_000
# so many rows cost about as much as one: reading the weights is what takes time
FEW_ROWS = 8
# from this many rows on, dequantizing once costs less than as many one-row products
DEQUANTIZE_ROWS = 16

Weight = mx.array | Packed


class Embedding:
    """Rows [..., K] of a table [V, K], dense or packed, in the activations' dtype."""

    def __init__(self, table: Weight, dtype: mx.Dtype):
        self.table = table if isinstance(table, mx.array) else table.with_dtype(dtype)
        self.dtype = dtype

    def __call__(self, ids: mx.array) -> mx.array:
        if isinstance(self.table, mx.array):
            return self.table[ids].astype(self.dtype)
        p = self.table
        biases = None if p.biases is None else p.biases[ids]
        return replace(p, weight=p.weight[ids], scales=p.scales[ids], biases=biases).dequantize(self.dtype)


class Linear(Protocol):
    def __call__(self, x: mx.array) -> mx.array: ...


class DenseLinear:
    """x @ W^T for a dense weight [N, K]."""

    def __init__(self, weight: mx.array):
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.astype(x.dtype).T


class ColumnLinear:
    """The CPU form of a dense float32 product: one row as W @ x in blocks of W's rows, several by GEMM."""

    def __init__(self, weight: mx.array):
        rows, columns = weight.shape
        blocks = -(-rows * columns // SMALL_PRODUCT)
        step = -(-rows // blocks)
        self.weight = weight
        self.blocks = [weight[i : i + step] for i in range(0, rows, step)]
        self.small = columns * 64 <= SMALL_PRODUCT  # else the blocks are too thin to pay

    def __call__(self, x: mx.array) -> mx.array:
        if x.size != x.shape[-1] or not self.small:
            return x @ self.weight.T
        column = x.reshape(-1, 1)
        parts = [block @ column for block in self.blocks]
        joined = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return joined.reshape(*x.shape[:-1], -1)


class PackedLinear:
    """x @ W^T for a packed weight [N, K]."""

    def __init__(self, packed: Packed):
        self.packed = packed

    def __call__(self, x: mx.array) -> mx.array:
        p = self.packed
        if not on_gpu() and x.size >= DEQUANTIZE_ROWS * x.shape[-1]:
            return x @ p.dequantize(x.dtype).T
        return mx.quantized_matmul(x, p.weight, p.scales, p.biases, True, p.group_size, p.bits, mode=p.mode)


class ExpertsLinear:
    """One weight per expert [E, N, K]: each row of x goes through the expert that `index` names."""

    def __init__(self, weight: Weight):
        self.weight = weight

    def __call__(self, x: mx.array, index: mx.array, ordered: bool) -> mx.array:
        """x [..., 1, K] and index [...] to [..., 1, N]; `ordered` says that index never falls."""
        w = self.weight
        if isinstance(w, mx.array):
            w = w.astype(x.dtype)
            return mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=index, sorted_indices=ordered)
        return mx.gather_qmm(
            x,
            w.weight,
            w.scales,
            w.biases,
            rhs_indices=index,
            transpose=True,
            group_size=w.group_size,
            bits=w.bits,
            mode=w.mode,
            sorted_indices=ordered,
        )


class Projections:
    """Several weights with one input: x [..., K] to a list of [..., N1], [..., N2], ...

    Few rows take one product with all of them; many rows take one each, whose outputs stand in memory alone.
    """

    def __init__(self, joined: Linear | None, parts: Sequence[Linear], widths: Sequence[int]):
        self.joined, self.parts = joined, parts
        self.bounds = list(accumulate(widths))[:-1]

    def __call__(self, x: mx.array) -> list[mx.array]:
        if self.joined is None or x.size > FEW_ROWS * x.shape[-1]:
            return [part(x) for part in self.parts]
        return list(mx.split(self.joined(x), self.bounds, axis=-1))


def prepare(weight: Weight, policy: Policy) -> Weight:
    """The weight as this machine multiplies with it: in the policy's dtype, dense where it says so.

    The result is evaluated, so that its source can be dropped before the next one is read.
    """
    if isinstance(weight, mx.array):
        # where float32 does not fit, a narrower weight is widened product by product
        widens = weight.dtype.size < policy.activations.size
        ready = weight if widens and not policy.dense else weight.astype(policy.activations)
    else:
        ready = (
            weight.dequantize(policy.activations) if policy.dense else weight.with_dtype(policy.activations)
        )
    evaluate(ready)
    return ready


def evaluate(weight: Weight) -> None:
    mx.eval(weight if isinstance(weight, mx.array) else list(weight.arrays))


class JoinedLinear:
    """A product of which this process computes a part, and `join` makes the whole."""

    def __init__(self, linear: Linear, join: Callable[[mx.array], mx.array]):
        self.linear, self.join = linear, join

    def __call__(self, x: mx.array) -> mx.array:
        return self.join(self.linear(x))


def make_linear(weight: Weight, join: Callable[[mx.array], mx.array] | None = None) -> Linear:
    """The product with one prepared weight [N, K], made whole by `join` where it is a part."""
    if join is not None:
        return JoinedLinear(make_linear(weight), join)
    if isinstance(weight, Packed):
        return PackedLinear(weight)
    on_cpu = not on_gpu() and weight.dtype == mx.float32
    return ColumnLinear(weight) if on_cpu else DenseLinear(weight)


def make_projections(weights: Sequence[Weight], policy: Policy) -> Projections:
    """Products with one input, joined into one weight where they are stored alike (bits, group and mode)."""
    ready = [prepare(w, policy) for w in weights]
    widths = [w.scales.shape[-2] if isinstance(w, Packed) else w.shape[-2] for w in ready]
    joined = _join(ready)
    if joined is None:
        return Projections(None, [make_linear(w) for w in ready], widths)
    evaluate(joined)
    parts = _cut(joined, list(accumulate(widths, initial=0)))
    return Projections(make_linear(joined), [make_linear(part) for part in parts], widths)


def _cut(joined: Weight, bounds: Sequence[int]) -> list[Weight]:
    """The rows between `bounds`, as views of the one array."""
    rows = [slice(a, b) for a, b in pairwise(bounds)]
    if isinstance(joined, mx.array):
        return [joined[r] for r in rows]
    p = joined
    return [
        replace(p, weight=p.weight[r], scales=p.scales[r], biases=None if p.biases is None else p.biases[r])
        for r in rows
    ]


def _join(weights: Sequence[Weight]) -> Weight | None:
    dense = [w for w in weights if isinstance(w, mx.array)]
    packed = [w for w in weights if isinstance(w, Packed)]
    if len(dense) == len(weights):
        return mx.concatenate(dense)
    if len(packed) == len(weights) and len({p.geometry for p in packed}) == 1:
        biases = [p.biases for p in packed if p.biases is not None]
        return replace(
            packed[0],
            weight=mx.concatenate([p.weight for p in packed]),
            scales=mx.concatenate([p.scales for p in packed]),
            biases=mx.concatenate(biases) if biases else None,
        )
    return None
