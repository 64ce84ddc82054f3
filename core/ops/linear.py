"""Products with weights in every stored form: dense, packed, and one per expert; `make_linear` chooses.

Weights are [N, K] (experts [E, N, K]) and a product maps x [..., K] to [..., N]. Packed forms are MLX's
triple of group_size, bits and mode. On a CPU one row goes as columns through the BLAS's small-matrix path.
Several rows of a packed weight are dequantized first: on a CPU MLX's own product uses no GEMM, and on CUDA
its GEMM is the faster one. A few rows on a GPU are `few`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise
from typing import Protocol

from ..checkpoint.packed import Packed
from ..kernels.dequantize import widen
from ..kernels.launch import backend
from ..machine.backend import Policy, mx, on_gpu
from ..native.library import wanted as native_wanted
from . import fused_matvec
from .fused_matvec import Weight

# OpenBLAS serves m * n * k up to a million from its small-matrix kernels, at memory speed
SMALL_PRODUCT = 1_000_000
# from this many rows on, dequantizing once costs less than as many one-row products
DEQUANTIZE_ROWS = 16


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
    @property
    def weight(self) -> Weight: ...

    def __call__(self, x: mx.array) -> mx.array: ...


class DenseLinear:
    """x @ W^T for a dense weight [N, K]."""

    def __init__(self, weight: mx.array):
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        if _is_few(x) and fused_matvec.ours() and fused_matvec.takes(self.weight):
            return fused_matvec.product(_rows(x), self.weight).reshape(*x.shape[:-1], -1)
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

    def __init__(self, weight: Packed):
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        if _is_few(x) and fused_matvec.ours() and fused_matvec.takes(self.weight):
            return fused_matvec.product(_rows(x), self.weight).reshape(*x.shape[:-1], -1)
        if _widens(x):
            return x @ dense_form(self.weight, x.dtype).T
        return fused_matvec.multiply(x, self.weight)


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def _is_few(x: mx.array) -> bool:
    """One to eight rows of bfloat16, which our kernel reads."""
    return x.dtype == mx.bfloat16 and x.size <= fused_matvec.MAX_ROWS * x.shape[-1]


def _widens(x: mx.array) -> bool:
    """Whether a packed weight is dequantized for so many rows."""
    if backend() == "cuda":  # MLX compiles its packed products there for seconds
        return not _is_few(x)
    return not on_gpu() and x.size >= DEQUANTIZE_ROWS * x.shape[-1]


def dense_form(weight: Packed, dtype: mx.Dtype) -> mx.array:
    """[..., N, K] in `dtype`, by our kernel where it can."""
    ours = backend() is not None and dtype == mx.bfloat16 and fused_matvec.takes(weight)
    return widen(weight) if ours else weight.dequantize(dtype)


class ExpertsLinear:
    """One weight per expert [E, N, K]: each row of x goes through the expert that `index` names."""

    def __init__(self, weight: Weight):
        self.weight = weight

    def __call__(self, x: mx.array, index: mx.array, ordered: bool) -> mx.array:
        """x [..., 1, K] and index [...] to [..., 1, N]; `ordered` says that index never falls."""
        w = self.weight
        if isinstance(w, Packed) and ordered and backend() == "cuda":
            # MLX's grouped GEMM reads these; its packed form takes rows one by one
            w = dense_form(w, x.dtype)
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


class Group:
    """Weights of one input that are stored alike, joined into one; `widths` are those of their outputs."""

    def __init__(self, weights: Sequence[Weight]):
        self.widths = [_width(w) for w in weights]
        self.weight = weights[0] if len(weights) == 1 else join_weights(weights)
        evaluate(self.weight)
        bounds = list(accumulate(self.widths, initial=0))
        parts = _cut(self.weight, bounds)
        for part in parts:
            evaluate(part)  # else every step would cut them out again
        self.cuts = bounds[1:-1]
        self.joined = make_linear(self.weight)
        self.parts = [make_linear(part) for part in parts] if len(parts) > 1 else [self.joined]

    def __call__(self, x: mx.array) -> list[mx.array]:
        if x.size > fused_matvec.MAX_ROWS * x.shape[-1] or len(self.parts) == 1:
            return [part(x) for part in self.parts]
        return list(mx.split(self.joined(x), self.cuts, axis=-1))


class Projections:
    """Several weights with one input: x [..., K] to a list of [..., N1], [..., N2], ...

    Few rows take one product per group of neighbours that are stored alike; many rows take one per weight,
    whose outputs stand in memory alone.
    """

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups

    @property
    def weights(self) -> list[Weight]:
        return [part.weight for group in self.groups for part in group.parts]

    def __call__(self, x: mx.array) -> list[mx.array]:
        return [y for group in self.groups for y in group(x)]


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

    @property
    def weight(self) -> Weight:
        return self.linear.weight

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
    """Products with one input, neighbours joined where they are stored alike (bits, group and mode)."""
    ready = [prepare(w, policy) for w in weights]
    if not policy.dense and native_wanted():  # which reads the parts as they are; joining copies them
        return Projections([Group([w]) for w in ready])
    return Projections([Group(list(alike)) for _, alike in groupby(ready, key=_kind)])


def _kind(weight: Weight) -> object:
    return weight.geometry if isinstance(weight, Packed) else None


def _width(weight: Weight) -> int:
    return weight.scales.shape[-2] if isinstance(weight, Packed) else weight.shape[-2]


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


def join_weights(weights: Sequence[Weight]) -> Weight:
    """Weights of one kind, below each other."""
    packed = [w for w in weights if isinstance(w, Packed)]
    if not packed:
        return mx.concatenate([w for w in weights if isinstance(w, mx.array)])
    biases = [p.biases for p in packed if p.biases is not None]
    return replace(
        packed[0],
        weight=mx.concatenate([p.weight for p in packed]),
        scales=mx.concatenate([p.scales for p in packed]),
        biases=mx.concatenate(biases) if biases else None,
    )
