"""Causal attention over a key-value cache, grouped queries.

On a GPU this is MLX's fused kernel. On a CPU MLX's own form spends most of its time in a scalar exponential,
so the softmax is ours and the query heads of one key head share a product.
"""

from functools import lru_cache

from ..backend import mx, on_gpu
from .elementwise import masked_softmax


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """q [B, H, T, D] over k, v [B, Hkv, S, D], the last T of which belong to the queries; returns [B, H, T,
    D]."""
    if on_gpu():
        mask = "causal" if q.shape[2] > 1 else None
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    batch, heads, length, dim = q.shape
    grouped = (q * scale).reshape(batch, k.shape[1], -1, dim)  # [B, Hkv, r*T, D]
    scores = (grouped @ k.swapaxes(-1, -2)).reshape(batch, heads, length, -1)  # [B, H, T, S]
    weights = masked_softmax(scores, causal_mask(length, k.shape[2])).astype(v.dtype)
    mixed = weights.reshape(batch, k.shape[1], -1, k.shape[2]) @ v
    return mixed.reshape(batch, heads, length, dim)


@lru_cache(maxsize=4)
def causal_mask(length: int, total: int) -> mx.array:
    """[length, total] float32: 0 where query i may see key j, that is j <= total - length + i, else -1e30."""
    seen = mx.arange(total)[None, :] <= mx.arange(total - length, total)[:, None]
    return mx.where(seen, 0.0, -1e30)
