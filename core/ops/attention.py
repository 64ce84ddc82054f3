"""Causal grouped-query attention over dense or 8-bit keys and values.

On a GPU this is MLX's fused kernel. On a CPU MLX's form spends most of its time in a scalar exponential, so
this module has its own softmax, and one product for all query heads that share a key head.
"""

from collections.abc import Callable
from functools import lru_cache

from ..checkpoint.packed import Packed
from ..machine.backend import mx, on_gpu
from .elementwise import masked_softmax
from .linear import DEQUANTIZE_ROWS


def causal_softmax(scores: mx.array) -> mx.array:
    """Return the softmax of scores [..., T, S] float32 over what each of the last T positions may see."""
    return masked_softmax(scores, causal_mask(*scores.shape[-2:]))


def attention(
    q: mx.array,
    k: mx.array | Packed,
    v: mx.array | Packed,
    scale: float,
    softmax: Callable[[mx.array], mx.array] = causal_softmax,
) -> mx.array:
    """Attend with q [B, H, T, D] to k, v [B, Hkv, S, D], whose last T positions are those of the queries.

    Returns [B, H, T, D]. q, dense k and v, and the result have one dtype; `scale` multiplies the scores.
    `softmax` does what `causal_softmax` does; a GPU has its own.
    """
    if q.shape[2] >= DEQUANTIZE_ROWS:
        k, v = (x.dequantize(q.dtype) if isinstance(x, Packed) else x for x in (k, v))
    if on_gpu() and isinstance(k, mx.array) and isinstance(v, mx.array):
        mask = "causal" if q.shape[2] > 1 else None
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    batch, heads, length, dim = q.shape
    groups, total = k.weight.shape[1:3] if isinstance(k, Packed) else k.shape[1:3]
    grouped = (q * scale).reshape(batch, groups, -1, dim)  # [B, Hkv, r*T, D]
    scores = _product(grouped, k, transpose=True).reshape(batch, heads, length, total)  # [B, H, T, S]
    weights = softmax(scores).astype(q.dtype)  # [B, H, T, S]
    return _product(weights.reshape(batch, groups, -1, total), v, transpose=False).reshape(q.shape)


def _product(x: mx.array, y: mx.array | Packed, *, transpose: bool) -> mx.array:
    """Return x @ y, or x @ y^T, over the last two axes; packed y stays packed."""
    if isinstance(y, mx.array):
        return x @ (y.swapaxes(-1, -2) if transpose else y)
    return mx.quantized_matmul(x, y.weight, y.scales, y.biases, transpose, y.group_size, y.bits)


@lru_cache(maxsize=4)
def causal_mask(length: int, total: int) -> mx.array:
    """Return [length, total] float32: 0 where query i sees key j (j <= total - length + i), else -1e30."""
    seen = mx.arange(total)[None, :] <= mx.arange(total - length, total)[:, None]
    return mx.where(seen, 0.0, -1e30)
