"""One decoder layer: norms, gated attention or gated delta net, then a feed-forward block.

Follows Qwen3.5's published architecture. The residual stream keeps the activations' dtype; norms, decays,
gates of the delta net and its state are float32.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from .backend import Policy, fuse, mx
from .cache import DeltaState, KVCache
from .config import ModelConfig
from .kernels.attention import attention
from .kernels.delta import gated_delta
from .kernels.elementwise import (
    decay_and_beta,
    gate_by_sigmoid,
    gated_norm,
    l2_normalise,
    silu,
    swiglu,
)
from .kernels.linear import Weight, make_linear, make_projections, prepare

FeedForward = Callable[[mx.array], mx.array]


class Mixer(Protocol):
    def __call__(self, x: mx.array, cache: KVCache | DeltaState) -> mx.array: ...


class Named:
    """The weights whose names begin with one prefix."""

    def __init__(self, tensors: Mapping[str, Weight], prefix: str = ""):
        self.tensors = tensors
        self.prefix = prefix

    def __getitem__(self, name: str) -> Weight:
        return self.tensors[self.prefix + name]

    def within(self, name: str) -> "Named":
        return Named(self.tensors, f"{self.prefix}{name}.")

    def vector(self, name: str) -> mx.array:
        """A small tensor that is never packed."""
        value = self[name]
        if not isinstance(value, mx.array):
            raise TypeError(f"{self.prefix}{name} is packed")
        mx.eval(value)
        return value


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / rms(x) * weight over the last axis, float32 inside, in the dtype of x; weight is already 1 + w."""
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


class DenseMLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Named, policy: Policy):
        self.gate_up = make_projections([weights["gate_proj"], weights["up_proj"]], policy)
        self.down = make_linear(prepare(weights["down_proj"], policy))

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(swiglu(*self.gate_up(x)))


class GatedAttention:
    """Attention with normalised queries and keys, partial rotary, and a sigmoid gate on its output."""

    def __init__(self, config: ModelConfig, weights: Named, policy: Policy):
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.rotary = config.head_dim, config.rotary_dim
        self.theta, self.eps = config.rope_theta, config.rms_norm_eps
        self.qkv = make_projections([weights[f"{name}_proj"] for name in "qkv"], policy)
        self.out = make_linear(prepare(weights["o_proj"], policy))
        self.q_norm, self.k_norm = weights.vector("q_norm"), weights.vector("k_norm")

    def __call__(self, x: mx.array, cache: KVCache | DeltaState) -> mx.array:
        """x [B, T, hidden] to the same shape; the cache grows by T."""
        if not isinstance(cache, KVCache):
            raise TypeError("an attention layer wants a KVCache")
        q, k, v, gate = self._heads(x)
        q, k = (self._rotate(h, cache.length) for h in (q, k))
        mixed = attention(q, *cache.append(k, v), self.dim**-0.5)
        return self.out(gate_by_sigmoid(mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1), gate))

    def _heads(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """q [B, H, T, D], k and v [B, Hkv, T, D], gate [B, T, H*D]; q_proj's rows are [query | gate] per
        head."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x)
        q, gate = mx.split(q.reshape(batch, length, self.heads, 2 * self.dim), 2, axis=-1)
        k, v = (h.reshape(batch, length, self.kv_heads, self.dim) for h in (k, v))
        q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        return *(h.swapaxes(1, 2) for h in (q, k, v)), gate.reshape(batch, length, -1)  # pyright: ignore

    def _rotate(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(x, self.rotary, traditional=False, base=self.theta, scale=1.0, offset=offset)


class GatedDeltaNet:
    """A short causal convolution, then the gated delta rule, then a gated norm."""

    def __init__(self, config: ModelConfig, weights: Named, policy: Policy):
        self.key_heads, self.key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_heads, self.value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        self.bounds = [config.key_dim, 2 * config.key_dim]
        self.eps = config.rms_norm_eps
        self.inputs = make_projections(
            [weights[f"in_proj_{name}"] for name in ("qkv", "z", "a", "b")], policy
        )
        self.out = make_linear(prepare(weights["out_proj"], policy))
        taps = weights.vector("conv1d").astype(policy.activations)  # [channels, K]
        self.taps = [taps[:, i] for i in range(taps.shape[1])]
        self.norm = weights.vector("norm").astype(mx.float32)
        self.log_a, self.dt_bias = weights.vector("A_log"), weights.vector("dt_bias")
        mx.eval(self.taps, self.norm)

    def __call__(self, x: mx.array, cache: KVCache | DeltaState) -> mx.array:
        """x [B, T, hidden] to the same shape; the state moves on by T."""
        if not isinstance(cache, DeltaState):
            raise TypeError("a delta net layer wants a DeltaState")
        output, cache.conv, cache.state = self.step(x, cache.conv, cache.state)
        return output

    def step(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The layer as a pure function of x [B, T, hidden] and its two states."""
        batch, length, _ = x.shape
        qkv, z, a, b = self.inputs(x)
        window = mx.concatenate([conv, qkv], axis=1)  # [B, K-1+T, channels]
        mixed = convolve([window[:, i : i + length] for i in range(len(self.taps))], self.taps)
        q, k, v = mx.split(mixed, self.bounds, axis=-1)
        q, k = (h.reshape(batch, length, self.key_heads, self.key_dim) for h in (q, k))
        v = v.reshape(batch, length, self.value_heads, self.value_dim)
        g, beta = decay_and_beta(a, b, self.log_a, self.dt_bias)
        q, k = l2_normalise(q, self.key_dim**-0.5), l2_normalise(k)
        output, state = gated_delta(q, k, v.astype(mx.float32), g, beta, state)
        gate = z.reshape(batch, length, self.value_heads, self.value_dim)
        output = gated_norm(output, self.norm, gate, self.eps).astype(x.dtype)
        # the tail is copied: a slice would keep the whole window alive
        return self.out(output.reshape(batch, length, -1)), mx.contiguous(window[:, length:]), state


@fuse
def convolve(windows: list[mx.array], taps: list[mx.array]) -> mx.array:
    """SiLU of the causal depthwise convolution: sum over i of windows[i] [B, T, C] * taps[i] [C]."""
    total = windows[0] * taps[0]
    for window, tap in zip(windows[1:], taps[1:], strict=True):
        total = total + window * tap
    return silu(total).astype(total.dtype)


class Layer:
    """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, weights: Named, mixer: Mixer, feed_forward: FeedForward, eps: float):
        self.mixer, self.feed_forward, self.eps = mixer, feed_forward, eps
        self.input_norm = weights.vector("input_layernorm")
        self.post_norm = weights.vector("post_attention_layernorm")

    def __call__(self, x: mx.array, cache: KVCache | DeltaState) -> mx.array:
        x = x + self.mixer(rms_norm(x, self.input_norm, self.eps), cache)
        return x + self.feed_forward(rms_norm(x, self.post_norm, self.eps))
