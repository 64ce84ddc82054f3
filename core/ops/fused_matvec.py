"""Products of one to eight rows on a GPU with what stands before and after them; `ours` says whose kernel.

Our kernel (`rows`) takes a norm, a residual or a SiLU gate along, and is the faster one on CUDA. MLX's own
are tuned for Metal, so there they do the products and MLX's functions the rest. QCHAT_PRODUCTS (`auto`,
`ours`, `mlx`) forces one.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from ..checkpoint.packed import Packed
from ..errors import UsageError
from ..kernels.launch import backend
from ..kernels.matvec import MAX_ROWS, Experts, Shape, run_rows
from ..kernels.unpack import DENSE_WEIGHTS, WEIGHTS
from ..machine.backend import mx
from .elementwise import swiglu

Weight = mx.array | Packed

__all__ = [
    "MAX_ROWS",
    "Norm",
    "Weight",
    "experts_gated",
    "experts_sum",
    "gated",
    "logits",
    "multiply",
    "ours",
    "product",
    "shared_sum",
    "takes",
]


class Norm(NamedTuple):
    """An RMS norm: weight [K] float32, already 1 + w, and epsilon."""

    weight: mx.array
    eps: float

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps).astype(x.dtype)


def ours() -> bool:
    """Whether our kernel multiplies a few rows here. Raises UsageError for a bad variable."""
    choice = os.environ.get("QCHAT_PRODUCTS", "auto")
    if choice not in ("auto", "ours", "mlx"):
        raise UsageError(f"QCHAT_PRODUCTS is {choice!r}, wanted auto, ours, mlx")
    return backend() is not None and (choice == "ours" or (choice == "auto" and backend() == "cuda"))


def takes(*weights: Weight) -> bool:
    """Whether our kernel reads all of these: stored alike, in bfloat16, rows a multiple of its slots."""
    kinds = {weight.geometry if isinstance(weight, Packed) else None for weight in weights}
    return len(kinds) == 1 and all(map(_ready, weights))


def product(
    x: mx.array, weight: Weight, *, norm: Norm | None = None, add: mx.array | None = None
) -> mx.array:
    """norm(x) @ weight^T + add: x [R, K], weight [N, K] and add [R, N] give [R, N], all bfloat16."""
    if ours() and takes(weight):
        return _run(x, [weight], norm=norm, add=add)
    y = multiply(norm(x) if norm else x, weight)
    return y if add is None else add + y


def logits(x: mx.array, weight: Weight, *, norm: Norm) -> mx.array:
    """`product` in float32, of weights that `takes` takes."""
    return _run(x, [weight], norm=norm, wide=True)


def gated(x: mx.array, gate: Weight, up: Weight, *, norm: Norm | None = None) -> mx.array:
    """silu(norm(x) @ gate^T) * (norm(x) @ up^T): x [R, K], weights [N, K] give [R, N]."""
    if ours() and takes(gate, up):
        return _run(x, [gate, up], norm=norm)
    x = norm(x) if norm else x
    return swiglu(multiply(x, gate), multiply(x, up))


def experts_gated(
    x: mx.array, gate: Weight, up: Weight, ids: mx.array, top: int, *, norm: Norm | None = None
) -> mx.array:
    """`gated` by the `top` experts that ids [R * top] name for each row of x [R, K]: [R * top, N]."""
    return _run(x, [gate, up], norm=norm, experts="each", top=top, chosen=[ids])


def experts_sum(
    x: mx.array, weight: Weight, ids: mx.array, shares: mx.array, top: int, *, add: mx.array
) -> mx.array:
    """add + the sum over `top` experts of shares * (x @ weight^T): x [R * top, K], add [R, N] give [R, N].

    ids and shares (float32) are [R * top].
    """
    return _run(x, [weight], add=add, experts="summed", top=top, chosen=[ids, shares])


def shared_sum(x: mx.array, weight: Weight, shares: mx.array, *, add: mx.array) -> mx.array:
    """add + shares [R] * (x @ weight^T), of one expert that all rows share."""
    return _run(x, [weight], add=add, experts="shared", chosen=[shares])


def multiply(x: mx.array, weight: Weight) -> mx.array:
    """x @ weight^T by MLX."""
    if isinstance(weight, mx.array):
        return x @ weight.astype(x.dtype).T
    w = weight
    return mx.quantized_matmul(x, w.weight, w.scales, w.biases, True, w.group_size, w.bits, mode=w.mode)


def _run(
    x: mx.array,
    weights: Sequence[Weight],
    *,
    norm: Norm | None = None,
    add: mx.array | None = None,
    experts: Experts = "none",
    top: int = 1,
    chosen: Sequence[mx.array] = (),
    wide: bool = False,
) -> mx.array:
    first = weights[0]
    rows = 1 if experts != "none" else 1 << (x.shape[0] - 1).bit_length()
    shape = Shape(
        geometry=first.geometry if isinstance(first, Packed) else None,
        columns=_columns(first),
        rows=rows,
        sides=len(weights),
        norm_eps=norm.eps if norm else None,
        adds=add is not None,
        experts=experts,
        top=top,
    )
    arrays = [w.arrays if isinstance(w, Packed) else (w,) for w in weights]
    extras = [*([norm.weight] if norm else []), *([add] if add is not None else []), *chosen]
    return run_rows(shape, x, arrays, extras, wide=wide)


def _ready(weight: Weight) -> bool:
    if isinstance(weight, Packed):
        narrow = weight.biases is None or weight.biases.dtype == mx.bfloat16
        return narrow and _columns(weight) % WEIGHTS == 0
    return weight.dtype == mx.bfloat16 and _columns(weight) % DENSE_WEIGHTS == 0


def _columns(weight: Weight) -> int:
    return weight.scales.shape[-1] * weight.group_size if isinstance(weight, Packed) else weight.shape[-1]
