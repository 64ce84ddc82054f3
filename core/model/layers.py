"""Decoder layers of Qwen3.5, as Hugging Face writes them: norm, attention or delta net, norm, feed-forward.

The residual stream keeps the activations' dtype; norms, and the delta net's gates, decays and state, are
float32. Axes: B batch, T time, S tokens in the cache; H query heads and Hkv key heads of D columns; Hk key
heads of Dk and Hv value heads of Dv columns in a delta net, whose convolution has K taps.
"""

from typing import Protocol

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import WeightScope
from ..machine.backend import Policy, fuse, mx
from ..ops.attention import attention
from ..ops.elementwise import decay_and_beta, gate_by_sigmoid, gated_norm, l2_normalise, silu, swiglu
from ..ops.gated_delta import delta_forms, delta_speculative, gated_delta
from ..ops.linear import make_linear, make_projections, materialize
from ..ops.rotary import Rotary
from .cache import LayerCache, SpeculativeTokens, as_delta_state, as_kv_cache

# Up to this many tokens a layer is compiled as a whole. Of more, the products take the time, and compiling
# around those breaks vectorised loops apart.
MAX_STEP_TOKENS = 8


class Layer(Protocol):
    """One decoder layer, plain or on kernels."""

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Map x [B, T, hidden] to the same shape; the cache moves on by T tokens."""
        ...

    def forward_speculative(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Do the same for a few tokens, of which `Cache.commit` may roll back the last ones."""
        ...


class FeedForward(Protocol):
    """The second half of a layer: a dense MLP or a mixture of experts."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [B, T, hidden], normalised, to the same shape."""
        ...


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return x / rms(x) * weight over the last axis, computed in float32, in the dtype of x.

    `weight` [hidden] float32 is already 1 + w.
    """
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


class GatedAttention:
    """Grouped-query attention with normalised queries and keys, partial RoPE, and a sigmoid output gate."""

    def __init__(self, config: ModelConfig, weights: WeightScope, policy: Policy):
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.rotary, self.eps = config.head_dim, Rotary(config), config.rms_norm_eps
        self.qkv = make_projections([weights[f"{name}_proj"] for name in "qkv"], policy)
        self.out = make_linear(materialize(weights["o_proj"], policy), policy.sum)
        self.q_norm, self.k_norm = (self.rotary.scale_norm(weights.vector(f"{name}_norm")) for name in "qk")

    def project(self, x: mx.array, place: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Map x [B, T, hidden] at `place`, as in `KVCache`, to q, k, v and the output gate.

        q is [B, H, T, D], k and v are [B, Hkv, T, D], the gate is [B, T, H*D]. The rows of q_proj are
        [query | gate] head by head.
        """
        batch, length, _ = x.shape
        q, k, v = self.qkv(x)
        q, gate = mx.split(q.reshape(batch, length, self.heads, 2 * self.dim), 2, axis=-1)  # [B, T, H, D]
        k, v = (h.reshape(batch, length, self.kv_heads, self.dim) for h in (k, v))  # [B, T, Hkv, D]
        q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        q, k, v = (h.swapaxes(1, 2) for h in (q, k, v))  # [B, H, T, D], [B, Hkv, T, D]
        q, k = mx.split(self.rotary(mx.concatenate([q, k], axis=1), place), [self.heads], axis=1)
        return q, k, v, gate.reshape(batch, length, -1)

    def finish(self, mixed: mx.array, gate: mx.array) -> mx.array:
        """Map attention's output [B, H, T, D] and the gate [B, T, H*D] to [B, T, hidden]."""
        return self.out(gate_by_sigmoid(mixed.swapaxes(1, 2).reshape(gate.shape), gate))


class GatedDeltaNet:
    """A short causal convolution, the gated delta rule, and a gated norm (arXiv 2412.06464)."""

    def __init__(self, config: ModelConfig, weights: WeightScope, policy: Policy):
        self.key_heads, self.key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_heads, self.value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        self.eps = config.rms_norm_eps
        self.forms = delta_forms(self.key_heads, self.key_dim, self.value_heads, self.value_dim)
        self.inputs = make_projections(
            [weights[f"in_proj_{name}"] for name in ("qkv", "z", "a", "b")], policy
        )
        self.out = make_linear(materialize(weights["out_proj"], policy), policy.sum)
        self.taps = mx.contiguous(weights.vector("conv1d").astype(policy.activations).T)  # [K, channels]
        self.norm = weights.vector("norm").astype(mx.float32)
        self.log_a, self.dt_bias = weights.vector("A_log"), weights.vector("dt_bias")
        mx.eval(self.taps, self.norm)

    def __call__(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Map x [B, T, hidden] and the states of `DeltaState` to [B, T, hidden] and the states after it."""
        window, (q, k, v, g, beta), z = self.project(x, conv)
        output, state = gated_delta(
            q, k, v, g, beta, state, forms=self.forms
        )  # [B, T, Hv, Dv], [B, Hv, Dk, Dv]
        # the tail is copied: a slice would keep the whole window alive
        return self.finish(output, z, x), mx.contiguous(window[:, x.shape[1] :]), state

    def forward_speculative(
        self, x: mx.array, conv: mx.array, state: mx.array
    ) -> tuple[mx.array, SpeculativeTokens]:
        """Map x [B, T, hidden] to [B, T, hidden] without deciding which states come after it."""
        window, (q, k, v, g, beta), z = self.project(x, conv)
        output, updates = delta_speculative(q, k, v, g, beta, state)  # both [B, T, Hv, Dv]
        return self.finish(output, z, x), SpeculativeTokens(window, k, g, updates)

    def project(self, x: mx.array, conv: mx.array) -> tuple[mx.array, tuple[mx.array, ...], mx.array]:
        """Return the convolution's window, the delta rule's inputs, and the gate z [B, T, Hv, Dv].

        The window is [B, K-1+T, channels]. The inputs are q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], log decay g
        and beta [B, T, Hv], all float32.
        """
        batch, length, _ = x.shape
        qkv, z, a, b = self.inputs(x)
        window = mx.concatenate([conv, qkv], axis=1)  # [B, K-1+T, channels]
        mixed = convolve(window, self.taps)  # [B, T, channels]
        qk, v = mx.split(mixed, [2 * self.key_heads * self.key_dim], axis=-1)
        qk = l2_normalise(qk.reshape(batch, length, 2, self.key_heads, self.key_dim))
        q, k = qk[:, :, 0] * self.key_dim**-0.5, qk[:, :, 1]  # [B, T, Hk, Dk]
        v = v.reshape(batch, length, self.value_heads, self.value_dim).astype(mx.float32)
        g, beta = decay_and_beta(a, b, self.log_a, self.dt_bias)  # [B, T, Hv]
        return window, (q, k, v, g, beta), z.reshape(batch, length, self.value_heads, self.value_dim)

    def finish(self, output: mx.array, z: mx.array, x: mx.array) -> mx.array:
        """Map the rule's output [B, T, Hv, Dv], normalised and gated by z, to the shape and dtype of x."""
        output = gated_norm(output, self.norm, z, self.eps).astype(x.dtype)
        return self.out(output.reshape(*x.shape[:2], -1))  # [B, T, hidden]


def convolve(window: mx.array, taps: mx.array) -> mx.array:
    """Return SiLU of a causal depthwise convolution [B, T, channels].

    `window` is [B, K-1+T, channels], `taps` [K, channels].
    """
    width = taps.shape[0]
    length = window.shape[1] - width + 1
    if length <= MAX_STEP_TOKENS:
        total = mx.stack([(window[:, i : i + width] * taps).sum(axis=1) for i in range(length)], axis=1)
    else:
        total = sum(
            (window[:, i : i + length] * taps[i] for i in range(1, width)), window[:, :length] * taps[0]
        )
    return silu(total).astype(window.dtype)


class DenseMLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: WeightScope, policy: Policy):
        self.gate_up = make_projections([weights["gate_proj"], weights["up_proj"]], policy)
        self.down = make_linear(materialize(weights["down_proj"], policy), policy.sum)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(swiglu(*self.gate_up(x)))  # [B, T, hidden]


class DecoderLayer:
    """The residual structure of both kinds of layer: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, weights: WeightScope, feed_forward: FeedForward):
        self.feed_forward, self.eps = feed_forward, config.rms_norm_eps
        self.input_norm = weights.vector("input_layernorm")
        self.post_norm = weights.vector("post_attention_layernorm")

    def enter(self, x: mx.array) -> mx.array:
        """Return the mixer's input [B, T, hidden]."""
        return rms_norm(x, self.input_norm, self.eps)

    def leave(self, x: mx.array, mixed: mx.array) -> mx.array:
        """Return the layer's output [B, T, hidden], given its input and the mixer's output."""
        x = x + mixed
        return x + self.feed_forward(rms_norm(x, self.post_norm, self.eps))


class AttentionLayer(DecoderLayer):
    """A decoder layer whose mixer is `GatedAttention` over a `KVCache`."""

    def __init__(self, config: ModelConfig, weights: WeightScope, feed_forward: FeedForward, policy: Policy):
        super().__init__(config, weights, feed_forward)
        self.mixer = GatedAttention(config, weights.within("self_attn"), policy)
        self._compiled_before, self._compiled_after = fuse(self.before), fuse(self.after)

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Map x [B, T, hidden] to the same shape; the cache grows by T tokens."""
        cache = as_kv_cache(cache)
        step = x.shape[1] <= MAX_STEP_TOKENS and cache.axes is None
        before, after = (self._compiled_before, self._compiled_after) if step else (self.before, self.after)
        q, k, v, gate = before(x, cache.place)
        keys, values = cache.append(k, v)  # [B, Hkv, S, D]
        mixed = attention(q, keys, values, self.mixer.dim**-0.5)  # [B, H, T, D]
        return after(x, mixed, gate)

    forward_speculative = __call__  # a KVCache is simply trimmed afterwards

    def before(self, x: mx.array, place: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return what attention needs: the result of `GatedAttention.project`."""
        return self.mixer.project(self.enter(x), place)

    def after(self, x: mx.array, mixed: mx.array, gate: mx.array) -> mx.array:
        """Return the layer's output [B, T, hidden], given attention's [B, H, T, D]."""
        return self.leave(x, self.mixer.finish(mixed, gate))


class DeltaLayer(DecoderLayer):
    """A decoder layer whose mixer is `GatedDeltaNet`; a pure function of its input and states."""

    def __init__(self, config: ModelConfig, weights: WeightScope, feed_forward: FeedForward, policy: Policy):
        super().__init__(config, weights, feed_forward)
        self.mixer = GatedDeltaNet(config, weights.within("linear_attn"), policy)
        self._compiled, self._compiled_speculative = fuse(self.forward), fuse(self._speculative)

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Map x [B, T, hidden] to the same shape; the states move on by T tokens."""
        cache = as_delta_state(cache)
        forward = self._compiled if x.shape[1] == 1 else self.forward
        x, cache.conv, cache.state = forward(x, cache.conv, cache.state)
        return x

    def forward_speculative(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Do the same for a few tokens; the states stay as they are until `DeltaState.commit`."""
        cache = as_delta_state(cache)
        x, *kept = self._compiled_speculative(x, cache.conv, cache.state)
        cache.speculative = SpeculativeTokens(*kept)
        return x

    def forward(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return the layer's output [B, T, hidden] and the two states after it."""
        mixed, conv, state = self.mixer(self.enter(x), conv, state)
        return self.leave(x, mixed), conv, state

    def _speculative(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, ...]:
        """Return the layer's output [B, T, hidden], then the arrays of `SpeculativeTokens`."""
        mixed, speculative = self.mixer.forward_speculative(self.enter(x), conv, state)
        return self.leave(x, mixed), *speculative
