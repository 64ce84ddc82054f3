"""Products with weights in every stored form: dense, packed, and one per expert; `make_linear` chooses.

Weights are [N, K] (experts [E, N, K]) and a product maps x [..., K] to [..., N]; packed weights have MLX's
triple of group_size, bits and mode. Products of many rows dequantize a packed weight first: MLX's packed
product uses no GEMM on a CPU and a slower one on CUDA. A few rows on a GPU go to `fused_matvec`, some more
and those of experts to CUDA's tensor cores.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise
from typing import Protocol

from ..checkpoint.packed import Packed
from ..kernels.dequantize import dequantize
from ..kernels.launch import backend
from ..kernels.tensor_product import MAX_TENSOR_ROWS, experts_product, fits, group_rows, tensor_product
from ..machine.backend import Policy, mx, on_gpu
from ..native.library import wanted as native_wanted
from . import fused_matvec
from .fused_matvec import Weight

# OpenBLAS runs m * n * k up to a million on its small-matrix kernels, at memory speed
SMALL_PRODUCT = 1_000_000
# from this many rows on, dequantizing once costs less than one product per row
DEQUANTIZE_ROWS = 16


class Embedding:
    """Look up rows [..., K] of a table [V, K], dense or packed, in the activations' `dtype`."""

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
    """A product with one weight [N, K]: x [..., K] to [..., N]."""

    @property
    def weight(self) -> Weight: ...

    def __call__(self, x: mx.array) -> mx.array: ...


class DenseLinear:
    """x @ W^T for a dense weight [N, K]."""

    def __init__(self, weight: mx.array):
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        if _takes_own_matvec(x, self.weight):
            return fused_matvec.product(_rows(x), self.weight).reshape(*x.shape[:-1], -1)
        return x @ self.weight.astype(x.dtype).T


class ColumnLinear:
    """x @ W^T in float32 on a CPU: one row of x as W @ x in blocks of W's rows, several rows by GEMM."""

    def __init__(self, weight: mx.array):
        rows, columns = weight.shape
        blocks = -(-rows * columns // SMALL_PRODUCT)
        step = -(-rows // blocks)
        self.weight = weight
        self.blocks = [weight[i : i + step] for i in range(0, rows, step)]
        self.small = columns * 64 <= SMALL_PRODUCT  # thinner blocks do not pay

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
        if _takes_own_matvec(x, self.weight):
            return fused_matvec.product(_rows(x), self.weight).reshape(*x.shape[:-1], -1)
        if _takes_tensor_cores(x, self.weight):
            return tensor_product(_rows(x), self.weight).reshape(*x.shape[:-1], -1)
        if _dequantizes(x):
            return x @ dense_form(self.weight, x.dtype).T
        return fused_matvec.mlx_product(x, self.weight)


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def _takes_own_matvec(x: mx.array, weight: Weight) -> bool:
    """Whether our matvec kernel takes x and `weight`, and is the form in use for them."""
    rows = x.size // x.shape[-1]
    return _fits_matvec(x) and fused_matvec.uses_own_matvec(weight, rows) and fused_matvec.supports(weight)


def _fits_matvec(x: mx.array) -> bool:
    """Whether x has the dtype and at most the number of rows that our matvec kernel takes."""
    return x.dtype == mx.bfloat16 and x.size <= fused_matvec.MAX_FUSED_ROWS * x.shape[-1]


def _takes_tensor_cores(x: mx.array, weight: Weight) -> bool:
    """Whether x has more rows than our matvec kernel takes, and not so many that dequantizing pays."""
    some = fused_matvec.MAX_FUSED_ROWS < x.size // x.shape[-1] <= MAX_TENSOR_ROWS
    return some and isinstance(weight, Packed) and _fits_tensor_cores(x, weight)


def _fits_tensor_cores(x: mx.array, weight: Packed) -> bool:
    return backend() == "cuda" and fits(x, weight) and fused_matvec.supports(weight)


def _dequantizes(x: mx.array) -> bool:
    """Whether to dequantize a packed weight before its product with x."""
    if backend() == "cuda":  # MLX spends seconds compiling its packed products there
        return not _fits_matvec(x)
    return not on_gpu() and x.size >= DEQUANTIZE_ROWS * x.shape[-1]


def dense_form(weight: Packed, dtype: mx.Dtype) -> mx.array:
    """Return the weight dequantized, [..., N, K] in `dtype`, by our kernel where it supports that."""
    own_kernel = backend() is not None and dtype == mx.bfloat16 and fused_matvec.supports(weight)
    return dequantize(weight) if own_kernel else weight.dequantize(dtype)


class ExpertsLinear:
    """A product with one weight per expert [E, N, K], which `index` chooses for each row of x."""

    def __init__(self, weight: Weight):
        self.weight = weight

    def __call__(self, x: mx.array, index: mx.array, ordered: bool) -> mx.array:
        """Map x [..., 1, K] and index [...] to [..., 1, N]; `ordered` promises that index is sorted."""
        w = self.weight
        if isinstance(w, Packed) and ordered and backend() == "cuda":
            # MLX has a grouped GEMM for dense weights only; its packed product goes row by row
            if _fits_tensor_cores(x, w):
                groups = group_rows(index, w.weight.shape[0])
                return experts_product(_rows(x), w, groups).reshape(*x.shape[:-1], -1)
            w = dense_form(w, x.dtype)
        if isinstance(w, mx.array):
            w = w.astype(x.dtype)
            # on CUDA, gather_mm takes the stride of rows from axis -2, which is 1 where indexing inserted it
            x = _rows(x).reshape(x.shape)
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
    """Weights of one input and one storage format, joined into one; `widths` are the output widths."""

    def __init__(self, weights: Sequence[Weight]):
        self.widths = [w.shape[-2] for w in weights]
        self.weight = weights[0] if len(weights) == 1 else join_weights(weights)
        evaluate(self.weight)
        bounds = list(accumulate(self.widths, initial=0))
        parts = cut_weight(self.weight, bounds)
        for part in parts:
            evaluate(part)  # a lazy slice would be cut out again in every step
        self.cuts = bounds[1:-1]
        self.joined = make_linear(self.weight)
        self.parts = [make_linear(part) for part in parts] if len(parts) > 1 else [self.joined]

    def __call__(self, x: mx.array) -> list[mx.array]:
        few = _takes_tensor_cores(x, self.weight) or x.size <= fused_matvec.MAX_FUSED_ROWS * x.shape[-1]
        if not few or len(self.parts) == 1:
            return [part(x) for part in self.parts]
        return list(mx.split(self.joined(x), self.cuts, axis=-1))


class Projections:
    """Products of one input with several weights: x [..., K] to a list of [..., N1], [..., N2], ...

    A few rows take one product per group of neighbours in one storage format. Many rows take one product per
    weight, so that each output has memory of its own.
    """

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups

    @property
    def weights(self) -> list[Weight]:
        """The single weights, in order."""
        return [part.weight for group in self.groups for part in group.parts]

    def __call__(self, x: mx.array) -> list[mx.array]:
        return [y for group in self.groups for y in group(x)]


def materialize(weight: Weight, policy: Policy) -> Weight:
    """Return the weight in the policy's dtype, dense where the policy says so, and evaluated.

    Evaluating it lets its source be dropped before the next weight is read.
    """
    if isinstance(weight, mx.array):
        # where dense float32 does not fit, each product casts a narrower weight anew
        narrower = weight.dtype.size < policy.activations.size
        ready = weight if narrower and not policy.dense else weight.astype(policy.activations)
    else:
        ready = (
            weight.dequantize(policy.activations) if policy.dense else weight.with_dtype(policy.activations)
        )
    evaluate(ready)
    return ready


def evaluate(weight: Weight) -> None:
    """Compute the arrays of `weight` now."""
    mx.eval(weight if isinstance(weight, mx.array) else list(weight.arrays))


class JoinedLinear:
    """A product of which this process computes a part; `join` makes the whole of all processes' parts."""

    def __init__(self, linear: Linear, join: Callable[[mx.array], mx.array]):
        self.linear, self.join = linear, join

    @property
    def weight(self) -> Weight:
        return self.linear.weight

    def __call__(self, x: mx.array) -> mx.array:
        return self.join(self.linear(x))


def make_linear(weight: Weight, join: Callable[[mx.array], mx.array] | None = None) -> Linear:
    """Return the product with one materialized weight [N, K]; `join` completes a part of a product."""
    if join is not None:
        return JoinedLinear(make_linear(weight), join)
    if isinstance(weight, Packed):
        return PackedLinear(weight)
    on_cpu = not on_gpu() and weight.dtype == mx.float32
    return ColumnLinear(weight) if on_cpu else DenseLinear(weight)


def make_projections(weights: Sequence[Weight], policy: Policy) -> Projections:
    """Materialize weights of one input; return their products, neighbours of one storage format joined."""
    ready = [materialize(w, policy) for w in weights]
    if not policy.dense and native_wanted():  # it reads the parts as they are; joining would copy them
        return Projections([Group([w]) for w in ready])
    return Projections([Group(list(alike)) for _, alike in groupby(ready, key=_storage)])


def _storage(weight: Weight) -> object:
    """Return bits, group and mode of a packed weight; None for a dense one."""
    return weight.geometry if isinstance(weight, Packed) else None


def cut_weight(joined: Weight, bounds: Sequence[int]) -> list[Weight]:
    """Return what lies between neighbouring `bounds` of the first axis as slices of the joined weight."""
    rows = [slice(a, b) for a, b in pairwise(bounds)]
    if isinstance(joined, mx.array):
        return [joined[r] for r in rows]
    p = joined
    return [
        replace(p, weight=p.weight[r], scales=p.scales[r], biases=None if p.biases is None else p.biases[r])
        for r in rows
    ]


def as_stack(weight: Weight) -> Weight:
    """Return a weight [N, K] as a stack [1, N, K]."""
    if isinstance(weight, mx.array):
        return weight[None]
    p = weight
    biases = None if p.biases is None else p.biases[None]
    return replace(p, weight=p.weight[None], scales=p.scales[None], biases=biases)


def fits_stack(weight: Weight, stack: Weight) -> bool:
    """Whether `weight` [N, K] could be one more of the stack [E, N, K]: the same code, shape and dtypes."""
    if isinstance(weight, Packed) and isinstance(stack, Packed):
        if weight.geometry != stack.geometry:
            return False
        pairs = list(zip(weight.arrays, stack.arrays, strict=True))
    elif isinstance(weight, mx.array) and isinstance(stack, mx.array):
        pairs = [(weight, stack)]
    else:
        return False
    return all(one.shape == many.shape[1:] and one.dtype == many.dtype for one, many in pairs)


def join_weights(weights: Sequence[Weight]) -> Weight:
    """Return weights of one storage format [N1, ...], [N2, ...], ... joined to [N1+N2+..., ...]."""
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
