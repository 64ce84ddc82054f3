"""One decoder layer: norms, gated attention or gated delta net, then a feed-forward block.

Follows Qwen3.5's published architecture. The residual stream keeps the activations' dtype; norms, decays,
gates of the delta net and its state are float32.
"""

from collections.abc import Mapping
from functools import partial
from typing import Protocol

from ..checkpoint.config import ModelConfig
from ..kernels import decode_attention, delta_net
from ..kernels.launch import backend
from ..machine.backend import Policy, fuse, mx
from ..ops import fused_matvec
from ..ops.attention import attention
from ..ops.elementwise import decay_and_beta, gate_by_sigmoid, gated_norm, l2_normalise, silu, swiglu
from ..ops.fused_matvec import MAX_ROWS, Norm
from ..ops.gated_delta import delta_rows, gated_delta, takes_kernels
from ..ops.linear import (
    DenseLinear,
    ExpertsLinear,
    PackedLinear,
    Projections,
    Weight,
    make_linear,
    make_projections,
    prepare,
)
from .cache import DeltaState, KVCache, Tentative


class FeedForward(Protocol):
    """What follows the mixer of a layer."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, T, hidden], normalised, to the same shape."""
        ...

    def takes_few(self) -> bool:
        """Whether `few` can do it here."""
        ...

    def few(self, x: mx.array, norm: Norm) -> mx.array:
        """x + the block's output of norm(x), for x [T, hidden] with few T."""
        ...


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


def is_plain(product: object) -> bool:
    """Whether a product still has the weights that kernels read: one may stand before it and look on."""
    return isinstance(product, Projections | PackedLinear | DenseLinear | ExpertsLinear)


class DenseMLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Named, policy: Policy):
        self.gate_up = make_projections([weights["gate_proj"], weights["up_proj"]], policy)
        self.down = make_linear(prepare(weights["down_proj"], policy), policy.sum)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(swiglu(*self.gate_up(x)))

    def takes_few(self) -> bool:
        return is_plain(self.gate_up) and is_plain(self.down)

    def few(self, x: mx.array, norm: Norm) -> mx.array:
        return fused_matvec.product(self.few_hidden(x, norm), self.down.weight, add=x)

    def few_hidden(self, x: mx.array, norm: Norm) -> mx.array:
        """silu(gate(norm(x))) * up(norm(x))."""
        return fused_matvec.gated(x, *self.gate_up.weights, norm=norm)


class GatedAttention:
    """Attention with normalised queries and keys, partial rotary, and a sigmoid gate on its output."""

    def __init__(self, config: ModelConfig, weights: Named, policy: Policy):
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.rotary = config.head_dim, config.rotary_dim
        self.theta, self.eps = config.rope_theta, config.rms_norm_eps
        self.qkv = make_projections([weights[f"{name}_proj"] for name in "qkv"], policy)
        self.out = make_linear(prepare(weights["o_proj"], policy), policy.sum)
        self.q_norm, self.k_norm = weights.vector("q_norm"), weights.vector("k_norm")
        self.sizes = decode_attention.Heads(self.heads, self.kv_heads, self.rotary, self.eps)
        self.turns = decode_attention.frequencies(self.rotary, self.theta)
        self.by_kernels = backend() is not None and decode_attention.fits(self.sizes, self.dim)

    def project(self, x: mx.array, offset: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """x [B, T, hidden] at position `offset` [] to q [B, H, T, D], k and v [B, Hkv, T, D], gate.

        The gate is [B, T, H*D]. The rows of q_proj are [query | gate] head by head.
        """
        batch, length, _ = x.shape
        q, k, v = self.qkv(x)
        q, gate = mx.split(q.reshape(batch, length, self.heads, 2 * self.dim), 2, axis=-1)
        k, v = (h.reshape(batch, length, self.kv_heads, self.dim) for h in (k, v))
        q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        q, k, v = (h.swapaxes(1, 2) for h in (q, k, v))
        q, k = mx.split(self._rotate(mx.concatenate([q, k], axis=1), offset), [self.heads], axis=1)
        return q, k, v, gate.reshape(batch, length, -1)

    def finish(self, mixed: mx.array, gate: mx.array) -> mx.array:
        """Attention's output [B, H, T, D] and the gate [B, T, H*D] to [B, T, hidden]."""
        return self.out(gate_by_sigmoid(mixed.swapaxes(1, 2).reshape(gate.shape), gate))

    def takes_few(self) -> bool:
        return self.by_kernels and is_plain(self.qkv) and is_plain(self.out)

    def few_project(self, x: mx.array, norm: Norm, offset: mx.array) -> tuple[mx.array, ...]:
        """x [T, hidden] to its projections [T, width], q [1, H, T, D], k and v [1, Hkv, T, D]."""
        main = join([fused_matvec.product(x, group.weight, norm=norm) for group in self.qkv.groups])
        return main, *decode_attention.split_heads(
            self.sizes, main, self.q_norm, self.k_norm, self.turns, offset
        )

    def _rotate(self, x: mx.array, offset: mx.array) -> mx.array:
        return mx.fast.rope(x, self.rotary, traditional=False, base=self.theta, scale=1.0, offset=offset)


def join(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


class GatedDeltaNet:
    """A short causal convolution, then the gated delta rule, then a gated norm."""

    def __init__(self, config: ModelConfig, weights: Named, policy: Policy):
        self.key_heads, self.key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_heads, self.value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        self.eps = config.rms_norm_eps
        self.inputs = make_projections(
            [weights[f"in_proj_{name}"] for name in ("qkv", "z", "a", "b")], policy
        )
        self.out = make_linear(prepare(weights["out_proj"], policy), policy.sum)
        self.taps = mx.contiguous(weights.vector("conv1d").astype(policy.activations).T)  # [K, channels]
        self.norm = weights.vector("norm").astype(mx.float32)
        self.log_a, self.dt_bias = weights.vector("A_log"), weights.vector("dt_bias")
        mx.eval(self.taps, self.norm)
        self.kernels = self._make_kernels(config) if policy.activations == mx.bfloat16 else None

    def _make_kernels(self, config: ModelConfig) -> delta_net.DeltaKernels | None:
        """What does all between the projections on a GPU, if its blocks divide the heads."""
        widths = [sum(group.widths) for group in self.inputs.groups]
        alone = len(widths) == 2 and len(self.inputs.groups[0].widths) == 2  # a and b, in a group of theirs
        main_width, ab_width = widths if alone else [sum(widths)] * 2
        net = delta_net.Net(
            key_heads=self.key_heads,
            value_heads=self.value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            taps=self.taps.shape[0],
            norm_eps=self.eps,
            main_width=main_width,
            z_at=config.conv_dim,
            ab_width=ab_width,
            a_at=0 if alone else config.conv_dim + config.value_dim,
        )
        vectors = (self.taps, self.log_a, self.dt_bias, self.norm)
        return delta_net.DeltaKernels(net, *vectors) if takes_kernels(net) else None

    def takes_few(self) -> bool:
        return self.kernels is not None and is_plain(self.inputs) and is_plain(self.out)

    def few(
        self, x: mx.array, norm: Norm, conv: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x [T, hidden] + the net's output of norm(x), with few T, and the two states after it."""
        projected = [fused_matvec.product(x, group.weight, norm=norm) for group in self.inputs.groups]
        mixed, conv, state = self._by_kernels(projected, conv, state)
        return fused_matvec.product(mixed, self.out.weight, add=x), conv, state

    def _by_kernels(
        self, projected: list[mx.array], conv: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Outputs [T, Hv * Dv] of projections [T, ...], group by group, and the two states after them."""
        if self.kernels is None:
            raise TypeError("this delta net has no kernels")
        main, ab = [join(projected)] * 2 if self.kernels.net.a_at else projected
        return self.kernels(main, ab, conv, state)

    def __call__(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """x [B, T, hidden] and the two states before it to [B, T, hidden] and the two states after it."""
        if self.kernels and x.shape[0] == 1 and is_plain(self.inputs):
            projected = [group.joined(x[0]) for group in self.inputs.groups]
            mixed, conv, state = self._by_kernels(projected, conv, state)
            return self.out(mixed)[None], conv, state
        window, (q, k, v, g, beta), gate = self.read(x, conv)
        output, state = gated_delta(q, k, v, g, beta, state)
        # the tail is copied: a slice would keep the whole window alive
        return self.finish(output, gate, x), mx.contiguous(window[:, x.shape[1] :]), state

    def tentatively(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, Tentative]:
        """The same for a few tokens, of which only some may count: the states after them are left open."""
        window, (q, k, v, g, beta), gate = self.read(x, conv)
        output, updates = delta_rows(q, k, v, g, beta, state)
        return self.finish(output, gate, x), Tentative(window, k, g, updates)

    def read(self, x: mx.array, conv: mx.array) -> tuple[mx.array, tuple[mx.array, ...], mx.array]:
        """The convolution's window [B, K-1+T, channels], the delta rule's q, k, v, g, beta, and the gate."""
        batch, length, _ = x.shape
        qkv, z, a, b = self.inputs(x)
        window = mx.concatenate([conv, qkv], axis=1)
        mixed = convolve(window, self.taps)
        qk, v = mx.split(mixed, [2 * self.key_heads * self.key_dim], axis=-1)
        qk = l2_normalise(qk.reshape(batch, length, 2, self.key_heads, self.key_dim))
        q, k = qk[:, :, 0] * self.key_dim**-0.5, qk[:, :, 1]
        v = v.reshape(batch, length, self.value_heads, self.value_dim).astype(mx.float32)
        g, beta = decay_and_beta(a, b, self.log_a, self.dt_bias)
        return window, (q, k, v, g, beta), z.reshape(batch, length, self.value_heads, self.value_dim)

    def finish(self, output: mx.array, gate: mx.array, x: mx.array) -> mx.array:
        """The rule's output [B, T, Hv, Dv], gated and normed, back to the shape and dtype of x."""
        output = gated_norm(output, self.norm, gate, self.eps).astype(x.dtype)
        return self.out(output.reshape(*x.shape[:2], -1))


def convolve(window: mx.array, taps: mx.array) -> mx.array:
    """SiLU of the causal depthwise convolution of [B, K-1+T, C] with taps [K, C]: [B, T, C]."""
    width = taps.shape[0]
    length = window.shape[1] - width + 1
    if length <= MAX_ROWS:
        total = mx.stack([(window[:, i : i + width] * taps).sum(axis=1) for i in range(length)], axis=1)
    else:
        total = sum(
            (window[:, i : i + length] * taps[i] for i in range(1, width)), window[:, :length] * taps[0]
        )
    return silu(total).astype(window.dtype)


def is_few(x: mx.array) -> bool:
    """Whether x [B, T, hidden] is for the kernels of few rows."""
    return x.shape[0] == 1 and x.shape[1] <= MAX_ROWS and x.dtype == mx.bfloat16


class Block:
    """What both kinds of layer share: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, weights: Named, feed_forward: FeedForward):
        self.feed_forward, self.eps = feed_forward, config.rms_norm_eps
        self.input_norm = weights.vector("input_layernorm")
        self.post_norm = weights.vector("post_attention_layernorm")
        self.before_mixer, self.before_block = (
            Norm(weight, self.eps) for weight in (self.input_norm, self.post_norm)
        )

    def enter(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.input_norm, self.eps)

    def leave(self, x: mx.array, mixed: mx.array) -> mx.array:
        x = x + mixed
        return x + self.feed_forward(rms_norm(x, self.post_norm, self.eps))


class AttentionLayer(Block):
    """A layer that attends."""

    def __init__(self, config: ModelConfig, weights: Named, feed_forward: FeedForward, policy: Policy):
        super().__init__(config, weights, feed_forward)
        self.mixer = GatedAttention(config, weights.within("self_attn"), policy)
        self._fused_before, self._fused_after = fuse(self.before), fuse(self.after)
        self._few_before, self._few_after = fuse(self.few_before), fuse(self.few_after)
        self._attend = fuse(partial(decode_attention.attend, self.mixer.sizes))

    def __call__(self, x: mx.array, cache: KVCache | DeltaState) -> mx.array:
        """x [B, T, hidden] to the same shape; the cache grows by T."""
        if not isinstance(cache, KVCache):
            raise TypeError("an attention layer wants a KVCache")
        if is_few(x) and not cache.quantized and self.takes_few():
            return self.few(x[0], cache)[None]
        # with many tokens products take the time, and fusing around those breaks vectorised loops apart
        few = x.shape[1] <= MAX_ROWS
        q, k, v, gate = (self._fused_before if few else self.before)(x, mx.array(cache.length))
        mixed = attention(q, *cache.append(k, v), self.mixer.dim**-0.5)
        return (self._fused_after if few else self.after)(x, mixed, gate)

    tentatively = __call__  # a KVCache takes back what does not count

    def takes_few(self) -> bool:
        """Whether kernels do the layer for few tokens, if the cache is not quantized."""
        return self.mixer.takes_few() and self.feed_forward.takes_few()

    def few(self, x: mx.array, cache: KVCache) -> mx.array:
        """The same by kernels, for x [T, hidden] with few T."""
        offset = decode_attention.position(cache.length)
        return self._few_after(x, self.few_attend(self._few_before(x, offset), cache, offset))

    def few_before(self, x: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
        """As `GatedAttention.few_project` gives them."""
        return self.mixer.few_project(x, self.before_mixer, offset)

    def few_attend(
        self, projected: tuple[mx.array, ...], cache: KVCache | DeltaState, offset: mx.array
    ) -> mx.array:
        """Attention's gated output [T, H*D], from what `few_before` gave; the cache grows by T."""
        if not isinstance(cache, KVCache):
            raise TypeError("an attention layer wants a KVCache")
        main, q, k, v = projected
        cache.write([k, v])
        keys, values = cache.buffer.parts
        return self._attend(main, q, keys, values, offset)

    def few_after(self, x: mx.array, mixed: mx.array) -> mx.array:
        """The rest of the layer, from attention's gated output [T, H*D]."""
        rows = fused_matvec.product(mixed, self.mixer.out.weight, add=x)
        return self.feed_forward.few(rows, self.before_block)

    def before(self, x: mx.array, offset: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """What attention needs, as `GatedAttention.project` gives it."""
        return self.mixer.project(self.enter(x), offset)

    def after(self, x: mx.array, mixed: mx.array, gate: mx.array) -> mx.array:
        """The rest of the layer."""
        return self.leave(x, self.mixer.finish(mixed, gate))


class DeltaLayer(Block):
    """A layer that remembers by the gated delta rule; a pure function of its input and states."""

    def __init__(self, config: ModelConfig, weights: Named, feed_forward: FeedForward, policy: Policy):
        super().__init__(config, weights, feed_forward)
        self.mixer = GatedDeltaNet(config, weights.within("linear_attn"), policy)
        self._fused, self._few, self._fused_rows = fuse(self.step), fuse(self.few), fuse(self.rows)

    def __call__(self, x: mx.array, cache: KVCache | DeltaState) -> mx.array:
        """x [B, T, hidden] to the same shape; the state moves on by T."""
        if not isinstance(cache, DeltaState):
            raise TypeError("a delta net layer wants a DeltaState")
        if is_few(x) and self.takes_few():
            rows, cache.conv, cache.state = self._few(x[0], cache.conv, cache.state)
            return rows[None]
        # many tokens spend their time in products; fusing around those only breaks vectorised loops apart
        step = self._fused if x.shape[1] == 1 else self.step
        x, cache.conv, cache.state = step(x, cache.conv, cache.state)
        return x

    def tentatively(self, x: mx.array, cache: KVCache | DeltaState) -> mx.array:
        """The same for a few tokens, of which `DeltaState.keep` will let only some count."""
        if not isinstance(cache, DeltaState):
            raise TypeError("a delta net layer wants a DeltaState")
        x, *parts = self._fused_rows(x, cache.conv, cache.state)
        cache.tentative = Tentative(*parts)
        return x

    def rows(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, ...]:
        """`tentatively` as a pure function: the layer's output, then the parts of `Tentative`."""
        mixed, tentative = self.mixer.tentatively(self.enter(x), conv, state)
        return self.leave(x, mixed), *tentative

    def step(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The layer with its states handed in and out."""
        mixed, conv, state = self.mixer(self.enter(x), conv, state)
        return self.leave(x, mixed), conv, state

    def takes_few(self) -> bool:
        """Whether kernels do the layer for few tokens."""
        return self.mixer.takes_few() and self.feed_forward.takes_few()

    def few(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The same by kernels, for x [T, hidden] with few T."""
        rows, conv, state = self.mixer.few(x, self.before_mixer, conv, state)
        return self.feed_forward.few(rows, self.before_block), conv, state
