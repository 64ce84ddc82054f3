"""Products of one to MAX_FUSED_ROWS rows on a GPU, fused with the norm, gate or residual around them.

`uses_own_matvec` chooses between our kernel (`kernels.matvec`), which is faster on CUDA, and MLX's separate
operations, which are tuned for Metal. QCHAT_PRODUCTS (`auto`, `ours`, `mlx`) forces one. Products with
experts exist as our kernel only.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..checkpoint.packed import Packed
from ..errors import UsageError
from ..kernels.cuda_driver import DriverError
from ..kernels.expert_routing import Router
from ..kernels.launch import backend, forced_on, is_recorded
from ..kernels.matvec import MAX_FUSED_ROWS, Experts, Shape, run_matvec
from ..kernels.unpack import DENSE_WEIGHTS, WEIGHTS
from ..machine.backend import mx
from . import choices
from .elementwise import swiglu

Weight = mx.array | Packed

__all__ = [
    "MAX_FUSED_ROWS",
    "Norm",
    "Weight",
    "experts_gate_up",
    "experts_sum",
    "gate_up",
    "logits",
    "mlx_product",
    "product",
    "routed_gate_up",
    "shared_sum",
    "supports",
    "uses_own_matvec",
]


class Norm(NamedTuple):
    """An RMS norm over rows [R, K]: `weight` [K] float32 is already 1 + w."""

    weight: mx.array
    eps: float

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps).astype(x.dtype)


def uses_own_matvec(weight: Weight | None = None, rows: int = 1) -> bool:
    """Whether products of a few rows run on our kernel here, with `weight` if that is given.

    Raises UsageError for a bad QCHAT_PRODUCTS.
    """
    choice = os.environ.get("QCHAT_PRODUCTS", "auto")
    if choice not in ("auto", "ours", "mlx"):
        raise UsageError(f"QCHAT_PRODUCTS is {choice!r}, wanted auto, ours, mlx")
    if backend() is None or choice != "auto":
        return backend() is not None and choice == "ours"
    raced = None
    if weight is not None and not forced_on():
        raced = choices.winner(choices.product_operation(rows), choices.weight_format(weight))
    return backend() == "cuda" if raced is None else raced == choices.OURS


def supports(*weights: Weight) -> bool:
    """Whether our kernel reads all of these in one launch: bfloat16, one format, rows of whole slots."""
    kinds = {weight.geometry if isinstance(weight, Packed) else None for weight in weights}
    return len(kinds) == 1 and all(map(_readable, weights))


def product(
    x: mx.array, weight: Weight, *, norm: Norm | None = None, add: mx.array | None = None
) -> mx.array:
    """Return norm(x) @ weight^T + add for x [R, K], weight [N, K], add [R, N]: [R, N], all bfloat16."""
    own = supports(weight) and uses_own_matvec(weight, x.shape[0])
    return (own_form if own else mlx_form)(x, weight, norm=norm, add=add)


def own_form(x: mx.array, weight: Weight, *, norm: Norm | None, add: mx.array | None) -> mx.array:
    """Return what `product` returns, by our kernel; `weight` must be one that it supports."""
    return _run(x, [weight], norm=norm, add=add)


def mlx_form(x: mx.array, weight: Weight, *, norm: Norm | None, add: mx.array | None) -> mx.array:
    """Return what `product` returns, by MLX's operations."""
    y = mlx_product(norm(x) if norm else x, weight)
    return y if add is None else add + y


def logits(x: mx.array, weight: Weight, *, norm: Norm) -> mx.array:
    """Return norm(x) @ weight^T in float32, by our kernel; `weight` must be one that it supports."""
    return _run(x, [weight], norm=norm, wide=True)


def gate_up(x: mx.array, gate: Weight, up: Weight, *, norm: Norm | None = None) -> mx.array:
    """Return silu(norm(x) @ gate^T) * (norm(x) @ up^T) for x [R, K], weights [N, K]: [R, N], all bfloat16."""
    if supports(gate, up) and uses_own_matvec(gate, x.shape[0]):
        return _run(x, [gate, up], norm=norm)
    x = norm(x) if norm else x
    return swiglu(mlx_product(x, gate), mlx_product(x, up))


def experts_gate_up(
    x: mx.array, gate: Weight, up: Weight, ids: mx.array, top: int, *, norm: Norm | None = None
) -> mx.array:
    """Return `gate_up` of each row of x [R, K] with its `top` experts: [R * top, N].

    gate and up are [E, N, K]; ids [R * top] uint32 are the experts of each row.
    """
    return _run(x, [gate, up], norm=norm, experts="each", top=top, routing=[ids])


def routed_gate_up(
    x: mx.array, gate: Weight, up: Weight, logits: mx.array, router: Router, *, norm: Norm | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Return `experts_gate_up` of the experts that `router` chooses and of the shared one, ids, and shares.

    gate and up are [E + 1, N, K], logits [R, E + 1] float32; each row has chosen + 1 ids and shares, the last
    of them the shared expert's.
    """
    hidden, ids, shares = _launch(
        x, [gate, up], norm=norm, experts="routed", top=router.chosen + 1, router=router, routing=[logits]
    )
    return hidden, ids, shares


def experts_sum(
    x: mx.array, weight: Weight, ids: mx.array, shares: mx.array, top: int, *, add: mx.array
) -> mx.array:
    """Return add + the sum over each row's `top` experts of share * (x @ weight^T): [R, N] bfloat16.

    x is [R * top, K], weight [E, N, K], add [R, N]; ids (uint32) and shares (float32) are [R * top].
    """
    return _run(x, [weight], add=add, experts="summed", top=top, routing=[ids, shares])


def shared_sum(x: mx.array, weight: Weight, shares: mx.array, *, add: mx.array) -> mx.array:
    """Return add + shares * (x @ weight^T) for the one expert [N, K] of all rows; shares are [R] float32."""
    return _run(x, [weight], add=add, experts="shared", routing=[shares])


def mlx_product(x: mx.array, weight: Weight) -> mx.array:
    """Return x @ weight^T by MLX's operations, in the dtype of x.

    Raises DriverError while kernels are recorded, of which MLX's operations cannot be part.
    """
    if is_recorded():
        raise DriverError("one kernel cannot read all weights of a product")
    if isinstance(weight, mx.array):
        return x @ weight.astype(x.dtype).T
    w = weight
    return mx.quantized_matmul(x, w.weight, w.scales, w.biases, True, w.group_size, w.bits, mode=w.mode)


def _run(x: mx.array, weights: Sequence[Weight], **how: Any) -> mx.array:
    """Launch our kernel as `_launch` does; return its one result."""
    (y,) = _launch(x, weights, **how)
    return y


def _launch(
    x: mx.array,
    weights: Sequence[Weight],
    *,
    norm: Norm | None = None,
    add: mx.array | None = None,
    experts: Experts = "none",
    top: int = 1,
    router: Router | None = None,
    routing: Sequence[mx.array] = (),
    wide: bool = False,
) -> list[mx.array]:
    """Launch our kernel; `routing` are logits, or ids and shares of experts; `wide` results are float32."""
    first = weights[0]
    rows = 1 if experts != "none" else 1 << (x.shape[0] - 1).bit_length()
    shape = Shape(
        geometry=first.geometry if isinstance(first, Packed) else None,
        columns=first.shape[-1],
        rows=rows,
        sides=len(weights),
        norm_eps=norm.eps if norm else None,
        adds=add is not None,
        experts=experts,
        top=top,
        router=router,
    )
    arrays = [w.arrays if isinstance(w, Packed) else (w,) for w in weights]
    extras = [*([norm.weight] if norm else []), *([add] if add is not None else []), *routing]
    return run_matvec(shape, x, arrays, extras, wide=wide)


def _readable(weight: Weight) -> bool:
    """Whether our kernel reads this weight: bfloat16 or bfloat16 scales, and whole slots in a row."""
    if isinstance(weight, Packed):
        narrow = weight.biases is None or weight.biases.dtype == mx.bfloat16
        return narrow and weight.shape[-1] % WEIGHTS == 0
    return weight.dtype == mx.bfloat16 and weight.shape[-1] % DENSE_WEIGHTS == 0
