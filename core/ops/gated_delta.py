"""The gated delta rule in fast forms: one step, chunks of many tokens, MLX's own, and a few speculative ones.

`gated_delta` chooses among the first three. `gated_delta_reference` says what all of them compute. Axes:
B batch, T time, Hk key heads of Dk columns, Hv value heads of Dv columns, N chunks of C tokens.
"""

import os
from collections.abc import Mapping
from functools import cache

from ..errors import UsageError
from ..machine.backend import fuse, mx, on_gpu
from . import choices
from .elementwise import exp
from .gated_delta_reference import gated_delta_rule

# tokens per chunk: few on a CPU, where the C x C work costs; a GPU is faster with fewer, larger products
CPU_CHUNK, GPU_CHUNK = 32, 64
FORMS = ("auto", "reference", "chunked", "mlx")
USUAL = dict.fromkeys(choices.LENGTHS, "chunked")


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    *,
    forms: Mapping[str, str] = USUAL,
) -> tuple[mx.array, mx.array]:
    """Return outputs [B, T, Hv, Dv] and the state [B, Hv, Dk, Dv] after them.

    The other arguments are those of `gated_delta_rule`; `forms` has one of FORMS for each of
    `choices.LENGTHS`. Raises UsageError for an unknown QCHAT_DELTA.
    """
    forced = delta_form()
    form = forms[choices.length_of(v.shape[1])] if forced == "auto" else forced
    if form == "reference":
        return gated_delta_rule(q, k, v, g, beta, state)
    if form == "mlx":
        return delta_mlx(q, k, v, g, beta, state)
    if forced == "auto" and v.shape[1] == 1:
        return delta_step(q, k, v, g, beta, state)
    return delta_chunks(q, k, v, g, beta, state, GPU_CHUNK if on_gpu() else CPU_CHUNK)


def delta_forms(key_heads: int, key_dim: int, value_heads: int, value_dim: int) -> Mapping[str, str]:
    """Return the form of these heads' rule for each of `choices.LENGTHS`: the one that won its race."""
    shape = choices.delta_shape(key_heads, key_dim, value_heads, value_dim)
    found = {length: choices.winner(choices.delta_operation(length), shape) for length in choices.LENGTHS}
    return {length: "mlx" if form == "mlx" else "chunked" for length, form in found.items()}


def delta_form() -> str:
    """Return the form that QCHAT_DELTA asks for: one of FORMS, `auto` by default.

    Raises UsageError for another word.
    """
    form = os.environ.get("QCHAT_DELTA", "auto")
    if form not in FORMS:
        raise UsageError(f"QCHAT_DELTA is {form!r}, wanted {', '.join(FORMS)}")
    return form


def delta_mlx(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Read any number of tokens by `mx.fast.gated_delta_update`; arguments and results are `gated_delta`'s.

    MLX's operation takes the decay itself instead of its logarithm, and the state as [B, Hv, Dv, Dk].
    """
    turned = mx.contiguous(state.swapaxes(-1, -2))  # [B, Hv, Dv, Dk]
    output, turned = mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, turned)
    return output, mx.contiguous(turned.swapaxes(-1, -2))


def delta_step(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Read one token: a single product of [q; k] with the old state, then one pass over the state.

    With m = a S^T k, where a = exp(g), the new state is a S + k (beta (v - m))^T and the output
    a S^T q + (q . k) beta (v - m). Arguments, T = 1, and results are those of `gated_delta`.
    """
    batch, _, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[2:]
    group = (batch, key_heads, heads // key_heads)  # r value heads share each key head
    pair = mx.concatenate([q, k], axis=1).swapaxes(1, 2)[:, :, None]  # [B, Hk, 1, 2, Dk]
    old = state.reshape(*group, key_dim, value_dim)  # [B, Hk, r, Dk, Dv]
    decay = mx.exp(g).reshape(*group, 1, 1)
    of_query, of_key = mx.split((pair @ old) * decay, 2, axis=3)  # [B, Hk, r, 1, Dv]
    delta = (v.reshape(*group, 1, value_dim) - of_key) * beta.reshape(*group, 1, 1)  # [B, Hk, r, 1, Dv]
    overlap = mx.sum(q * k, axis=-1).reshape(batch, key_heads, 1, 1, 1)
    new = old * decay + k.reshape(batch, key_heads, 1, key_dim, 1) * delta  # [B, Hk, r, Dk, Dv]
    return (of_query + overlap * delta).reshape(v.shape), new.reshape(state.shape)


def delta_chunks(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, chunk: int
) -> tuple[mx.array, mx.array]:
    """Read many tokens, `chunk` at a time, by matrix products alone.

    After Yang et al. (arXiv 2406.06484, section 3), with the decay of arXiv 2412.06464. With G the running
    sum of log decays inside a chunk and A[t,i] = beta_t exp(G_t - G_i) (k_t . k_i) for i < t:
        (I + A) U = beta (V - exp(G) K S)                    O = exp(G) Q S + tril(exp(G_t - G_i) Q K^T) U
        S' = exp(G_C) S + (exp(G_C - G) K)^T U
    Arguments and results are those of `gated_delta`.
    """
    length, (batch, _, heads, value_dim) = v.shape[1], v.shape
    q, k, v, g, beta = (_to_chunks(x, chunk) for x in (q, k, v, g, beta))  # [B, H, N, C, ...]
    repeats = heads // k.shape[1]
    grown, ratio, inside = _decays(g, chunk)  # [B, Hv, N, C], twice [B, Hv, N, C, C]
    inverse = _inverse(_repeat(k @ k.swapaxes(-1, -2), repeats) * ratio * beta[..., None])  # [B, Hv, N, C, C]
    attention = _repeat(q @ k.swapaxes(-1, -2), repeats) * inside  # [B, Hv, N, C, C]
    q, k = _repeat(q, repeats), _repeat(k, repeats)  # [B, Hv, N, C, Dk]
    values = inverse @ (v * beta[..., None])  # [B, Hv, N, C, Dv]
    keys = inverse @ (k * (beta * grown)[..., None])  # [B, Hv, N, C, Dk]
    readers = mx.concatenate([keys, q * grown[..., None]], axis=3)  # [B, Hv, N, 2C, Dk]
    last = grown[..., -1:]  # [B, Hv, N, 1]
    # exp(G_C - G_t) is the last row of the ratios: never above one, so nothing overflows
    tails = (k * inside[..., -1, :, None]).swapaxes(-1, -2)  # [B, Hv, N, Dk, C]
    outputs = []
    for n in range(v.shape[2]):
        of_keys, of_queries = mx.split(readers[:, :, n] @ state, 2, axis=2)  # [B, Hv, C, Dv]
        update = values[:, :, n] - of_keys  # [B, Hv, C, Dv]
        outputs.append(of_queries + attention[:, :, n] @ update)
        state = state * last[:, :, n, :, None] + tails[:, :, n] @ update  # [B, Hv, Dk, Dv]
    output = mx.stack(outputs, axis=2).reshape(batch, heads, -1, value_dim)[:, :, :length]
    return output.swapaxes(1, 2), state  # [B, T, Hv, Dv]


def delta_speculative(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Read a few tokens as one chunk; return outputs and updates U, both [B, T, Hv, Dv].

    The state stays as it is: `state_after` computes the one after any number of them.
    """
    length, repeats = v.shape[1], v.shape[2] // k.shape[2]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, T, D]
    g, beta = g.swapaxes(1, 2), beta.swapaxes(1, 2)  # [B, Hv, T]
    grown, ratio, inside = _decays(g, length)
    pair = mx.concatenate([q, k], axis=2)  # [B, Hk, 2T, Dk]
    of_queries, of_keys = mx.split(_repeat(pair @ k.swapaxes(-1, -2), repeats), 2, axis=2)
    inverse = _inverse(of_keys * ratio * beta[..., None])  # [B, Hv, T, T]
    readers = _repeat(pair, repeats) @ state  # [B, Hv, 2T, Dv]
    q_state, k_state = mx.split(readers, 2, axis=2)  # [B, Hv, T, Dv]
    grown = grown[..., None]
    updates = inverse @ ((v - k_state * grown) * beta[..., None])  # [B, Hv, T, Dv]
    output = q_state * grown + (of_queries * inside) @ updates
    return output.swapaxes(1, 2), updates.swapaxes(1, 2)


def state_after(state: mx.array, k: mx.array, g: mx.array, updates: mx.array) -> mx.array:
    """Return the state [B, Hv, Dk, Dv] after T tokens read from `state` by `delta_speculative`.

    k [B, T, Hk, Dk] and g [B, T, Hv] are their keys and log decays, updates [B, T, Hv, Dv] their U.
    """
    total = mx.cumsum(g, axis=1)  # [B, T, Hv]
    last = total[:, -1:]
    tails = mx.repeat(k, g.shape[2] // k.shape[2], axis=2) * mx.exp(last - total)[..., None]  # [B, T, Hv, Dk]
    return state * mx.exp(last).swapaxes(1, 2)[..., None] + (
        tails.transpose(0, 2, 3, 1) @ updates.swapaxes(1, 2)
    )


def _to_chunks(x: mx.array, chunk: int) -> mx.array:
    """Map [B, T, H, ...] to [B, H, N, C, ...], padded at the end with zeros, which change no state."""
    padding = -x.shape[1] % chunk
    if padding:
        x = mx.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    x = x.swapaxes(1, 2)
    return mx.contiguous(x).reshape(*x.shape[:2], -1, chunk, *x.shape[3:])


def _repeat(x: mx.array, repeats: int) -> mx.array:
    """Repeat each key head of [B, Hk, ...] for its consecutive value heads: [B, Hv, ...]."""
    return x if repeats == 1 else mx.repeat(x, repeats, axis=1)


@cache
def _masks(chunk: int) -> tuple[mx.array, mx.array]:
    """Return masks [C, C] that are 0 where i < t, and where i <= t, and a very negative number elsewhere."""
    ones = mx.ones((chunk, chunk), mx.float32)
    strict, inclusive = mx.tril(ones, -1), mx.tril(ones)
    return (strict - 1.0) * 1e4, (inclusive - 1.0) * 1e4


def _decays(g: mx.array, chunk: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return exp(G_t) [..., C], then exp(G_t - G_i) [..., C, C] for i < t, and again for i <= t.

    G is the running sum of the log decays g [..., C]; the rest of both matrices is 0.
    """
    strict, inclusive = _masks(chunk)
    total = mx.cumsum(g, axis=-1)
    return _exp_decays(total, strict, inclusive)


@fuse
def _exp_decays(
    total: mx.array, strict: mx.array, inclusive: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    between = total[..., :, None] - total[..., None, :]
    # clamp before the exponential: the masked half is positive and could overflow
    between = mx.minimum(between, 0.0)
    low = mx.where(strict < 0, 0.0, exp(between + strict))
    return exp(total), low, mx.where(inclusive < 0, 0.0, exp(between + inclusive))


@cache
def _block_masks(chunk: int) -> tuple[mx.array, ...]:
    """Return a mask [C, C] for b = 1 and for 2, 4, ... < C: ones on the odd sub-diagonal blocks of size b."""
    row, column = mx.arange(chunk)[:, None], mx.arange(chunk)[None, :]
    masks, size = [], 1
    while size < max(chunk, 2):
        odd = (row // size) % 2 == 1
        masks.append((odd & (column // size == row // size - 1)).astype(mx.float32))
        size *= 2
    return tuple(masks)


def _inverse(a: mx.array) -> mx.array:
    """Return (I + A)^-1 for strictly lower triangular A [..., C, C], merging solved diagonal blocks in pairs.

    Doubling powers of A explodes where keys repeat; the block form stays within 2e-6 of a float64 solve.
    """
    chunk = a.shape[-1]
    first, *masks = _block_masks(chunk)
    inverse = mx.eye(chunk, dtype=a.dtype) - a * first
    for mask in masks:
        inverse = inverse - inverse @ ((a * mask) @ inverse)
    return inverse
