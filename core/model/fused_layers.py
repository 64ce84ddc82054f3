"""Decoder layers on GPU kernels: `kernel_form` wraps a plain layer where the device and its shapes allow it.

Up to MAX_FUSED_ROWS tokens pass a layer in a handful of launches, because norms, gates and residuals are part
of the products. A delta net's mixer runs on kernels for prompts, too. All weights are the plain layer's.
Activations must be bfloat16. Under ranks, whose sums come between the products, only the mixer is fused.
"""

from functools import partial
from typing import Protocol

from ..checkpoint.packed import Packed
from ..kernels import decode_attention, delta_net
from ..kernels.expert_routing import Router, route
from ..kernels.launch import backend, forced_on, is_recorded
from ..kernels.rows import join as join_rows
from ..machine.backend import Policy, fuse, mx
from ..ops import choices, fused_matvec
from ..ops.fused_matvec import MAX_FUSED_ROWS, Norm
from ..ops.gated_delta import delta_form
from ..ops.linear import Projections, Weight, as_stack, cut_weight, evaluate, fits_stack, join_weights
from .cache import LayerCache, SpeculativeStates, as_delta_state, as_kv_cache
from .layers import AttentionLayer, DeltaLayer, DenseMLP, FeedForward, GatedAttention, GatedDeltaNet, Layer
from .moe import MixtureOfExperts


def kernel_form(layer: AttentionLayer | DeltaLayer, policy: Policy) -> Layer:
    """Return a layer that runs as much of `layer` on kernels as they support; `layer` itself if none.

    Call `settle` first: it decides which forms this device takes.
    """
    if backend() is None or policy.activations != mx.bfloat16:
        return layer
    feed_forward = fused_feed_forward(layer.feed_forward) if policy.sum is None else None
    if isinstance(layer, AttentionLayer):
        fits = takes_attention(layer.mixer)
        return FusedAttentionLayer(layer, feed_forward) if fits and feed_forward else layer
    kernels = delta_kernels(layer.mixer)
    if kernels is None:
        return layer
    lengths = own_lengths(layer.mixer)
    if feed_forward and "1 token" in lengths:
        return FusedDeltaLayer(layer, kernels, lengths, feed_forward)
    return KernelDeltaLayer(layer, kernels, lengths) if lengths else layer


def takes_attention(mixer: GatedAttention) -> bool:
    """Whether the attention kernels fit these heads, and are the form in use for them."""
    shape = choices.attention_shape(mixer.heads, mixer.kv_heads, mixer.dim)
    fits = decode_attention.fits(attention_heads(mixer), mixer.dim)
    return fits and choices.takes_ours("attention, 1 token", shape)


def own_lengths(mixer: GatedDeltaNet) -> frozenset[str]:
    """Return those of `choices.LENGTHS` for which our kernels are the delta net's form in use."""
    shape = choices.delta_shape(mixer.key_heads, mixer.key_dim, mixer.value_heads, mixer.value_dim)
    return frozenset(
        length for length in choices.LENGTHS if choices.takes_ours(choices.delta_operation(length), shape)
    )


def layer_forms(layer: Layer) -> list[str]:
    """Return the names of the delta rule's forms that a layer uses."""
    plain = plain_form(layer)
    if isinstance(plain, AttentionLayer):
        return []
    forced = delta_form()
    own = [choices.OURS] if isinstance(layer, KernelDeltaLayer) else []
    return [*own, *(plain.mixer.forms.values() if forced == "auto" else [forced])]


def plain_form(layer: Layer) -> AttentionLayer | DeltaLayer:
    """Return the plain layer that `layer` was made of, or is."""
    if isinstance(layer, FusedAttentionLayer | KernelDeltaLayer):
        return layer.plain
    if isinstance(layer, AttentionLayer | DeltaLayer):
        return layer
    raise TypeError(f"{type(layer).__name__} has no plain form")


def layer_norms(layer: AttentionLayer | DeltaLayer) -> tuple[Norm, Norm]:
    """Return the norms before the mixer and before the feed-forward block."""
    return Norm(layer.input_norm, layer.eps), Norm(layer.post_norm, layer.eps)


class FusedFeedForward(Protocol):
    """A feed-forward block with the norm before it and the residual around it."""

    def __call__(self, x: mx.array, norm: Norm) -> mx.array:
        """Return x + block(norm(x)) for x [T, hidden] of at most MAX_FUSED_ROWS rows."""
        ...


def fused_feed_forward(block: FeedForward) -> FusedFeedForward | None:
    """Return the fused form of `block`; None where the matvec kernel cannot read its experts' weights."""
    if isinstance(block, DenseMLP):
        return FusedMLP(block)
    if isinstance(block, MixtureOfExperts) and supports_experts(block):
        return FusedExperts(block)
    return None


class FusedMLP:
    """`DenseMLP` as two products."""

    def __init__(self, block: DenseMLP):
        self._gate, self._up = block.gate_up.weights
        self.down = block.down.weight

    def __call__(self, x: mx.array, norm: Norm) -> mx.array:
        return fused_matvec.product(self.inner(x, norm), self.down, add=x)

    def inner(self, x: mx.array, norm: Norm) -> mx.array:
        """Return silu(gate(norm(x))) * up(norm(x)) [T, intermediate]."""
        return fused_matvec.gate_up(x, self._gate, self._up, norm=norm)


def supports_experts(block: MixtureOfExperts) -> bool:
    """Whether our matvec kernel is used here and reads all weights of `block`."""
    shared = block.shared
    alike = [
        [block.gate.weight, block.up.weight],
        [block.down.weight],
        [block.router.weight, block.shared_gate.weight],
        shared.gate_up.weights,
        [shared.down.weight],
    ]
    stack = block.gate.weight
    chosen = choices.winner("experts, 1 token", choices.experts_shape(stack.shape[0], block.top, stack))
    wanted = fused_matvec.uses_own_matvec() if chosen is None or forced_on() else chosen == choices.OURS
    return wanted and all(fused_matvec.supports(*weights) for weights in alike)


class FusedExperts:
    """`MixtureOfExperts`: a product for all gates, routing, and two products per kind of expert.

    Where the shared expert is stored as the others are, it is stacked behind them: three launches in all.
    """

    def __init__(self, block: MixtureOfExperts):
        self._block, self._shared = block, FusedMLP(block.shared)
        self._gates: Weight = join_weights([block.router.weight, block.shared_gate.weight])  # [E+1, hidden]
        evaluate(self._gates)
        self._stacked = stack_shared(block)

    def __call__(self, x: mx.array, norm: Norm) -> mx.array:
        block, top = self._block, self._block.top
        logits = fused_matvec.logits(x, self._gates, norm=norm)  # [T, E+1]
        if self._stacked is not None:
            gate, up, down = self._stacked
            router = Router(logits.shape[-1] - 1, top, block.renormalise)
            hidden, ids, shares = fused_matvec.routed_gate_up(x, gate, up, logits, router, norm=norm)
            return fused_matvec.experts_sum(hidden, down, ids, shares, top + 1, add=x)  # [T, hidden]
        ids, shares, shared = route(logits, top, renormalise=block.renormalise)  # [T*top] twice, [T]
        hidden = fused_matvec.experts_gate_up(x, block.gate.weight, block.up.weight, ids, top, norm=norm)
        shared_hidden = self._shared.inner(x, norm)
        x = fused_matvec.experts_sum(hidden, block.down.weight, ids, shares, top, add=x)  # [T, hidden]
        return fused_matvec.shared_sum(shared_hidden, self._shared.down, shared, add=x)


def stack_shared(block: MixtureOfExperts) -> tuple[Weight, ...] | None:
    """Stack the shared expert behind the others: gate, up, down [E + 1, N, K]; None where it differs.

    The block's experts become views of the stacks; only the shared one is kept twice.
    """
    shared = [*block.shared.gate_up.weights, block.shared.down.weight]
    pairs = list(zip((block.gate, block.up, block.down), shared, strict=True))
    if not all(fits_stack(one, experts.weight) for experts, one in pairs):
        return None
    stacks = []
    for experts, one in pairs:
        stack = join_weights([experts.weight, as_stack(one)])
        evaluate(stack)
        (experts.weight,) = cut_weight(stack, [0, stack.shape[0] - 1])
        evaluate(experts.weight)
        stacks.append(stack)
    return tuple(stacks)


def attention_heads(mixer: GatedAttention) -> decode_attention.Heads:
    """Return the sizes that the attention kernels are compiled for."""
    return decode_attention.Heads(mixer.heads, mixer.kv_heads, mixer.rotary.dims, mixer.eps)


class FusedAttentionLayer:
    """`AttentionLayer` on kernels for a few tokens, and the plain layer for more or over an 8-bit cache."""

    def __init__(self, plain: AttentionLayer, feed_forward: FusedFeedForward):
        self.plain, self._mixer, self._feed_forward = plain, plain.mixer, feed_forward
        self._input_norm, self._post_norm = layer_norms(plain)
        self._heads = attention_heads(plain.mixer)
        # a token's keys or values
        self.key_like = mx.zeros((1, plain.mixer.kv_heads, 1, plain.mixer.dim), mx.bfloat16)
        rotary = plain.mixer.rotary
        own = decode_attention.rope_frequencies(rotary.dims, rotary.theta)
        self._frequencies = rotary.frequencies if rotary.is_scaled else own
        self._compiled_before, self._compiled_after = fuse(self.before), fuse(self.after)
        self._compiled_attention = fuse(partial(decode_attention.attend, self._heads))

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Map x [1, T, hidden] to the same shape; the cache grows by T tokens."""
        cache = as_kv_cache(cache)
        if x.shape[1] > MAX_FUSED_ROWS or cache.quantized or cache.axes is not None:
            return self.plain(x, cache)
        offset = decode_attention.position(cache.length)
        projected = self._compiled_before(x[0], decode_attention.position(cache.length + cache.shift))
        return self._compiled_after(x[0], self.attend(projected, cache, offset))[None]

    forward_speculative = __call__  # a KVCache is simply trimmed afterwards

    def before(self, x: mx.array, place: mx.array) -> tuple[mx.array, ...]:
        """Map x [T, hidden] at position `place` [1] to what attention needs.

        These are projections [T, width], q [1, H, T, D], k and v [1, Hkv, T, D].
        """
        mixer = self._mixer
        main = join(project(x, mixer.qkv, self._input_norm))  # [T, width]
        return main, *decode_attention.split_heads(
            self._heads, main, mixer.q_norm, mixer.k_norm, self._frequencies, place
        )

    def attend_in_place(
        self, x: mx.array, turned: mx.array, offset: mx.array, found_at: mx.array, splits: int
    ) -> mx.array:
        """Return attention's gated output [T, H*D] for x [T, hidden] over the cache described by `found_at`.

        Keys and values go into that from position `offset` [1] on, and are rotated as those at `turned` [1].
        """
        mixer = self._mixer
        main = join(project(x, mixer.qkv, self._input_norm))  # [T, width]
        q = decode_attention.split_heads_into(
            self._heads, main, mixer.q_norm, mixer.k_norm, self._frequencies, turned, offset, found_at
        )
        return decode_attention.attend_at(self._heads, main, q, found_at, offset, splits)

    def attend(self, projected: tuple[mx.array, ...], cache: LayerCache, offset: mx.array) -> mx.array:
        """Return attention's gated output [T, H*D] from what `before` returned; grow the cache by T."""
        main, q, k, v = projected
        cache = as_kv_cache(cache)
        cache.write([k, v])
        keys, values = cache.buffer.parts
        return self._compiled_attention(main, q, keys, values, offset)

    def after(self, x: mx.array, mixed: mx.array) -> mx.array:
        """Return the layer's output [T, hidden], given its input and attention's gated output [T, H*D]."""
        x = fused_matvec.product(mixed, self._mixer.out.weight, add=x)  # [T, hidden]
        return self._feed_forward(x, self._post_norm)


def delta_kernels(mixer: GatedDeltaNet) -> delta_net.DeltaKernels | None:
    """Return the kernels between a delta net's projections; None where their blocks do not divide its heads,
    or QCHAT_DELTA asks for another form of the rule."""
    widths = [sum(group.widths) for group in mixer.inputs.groups]
    # a and b are in a group of their own, or all four projections in one
    split = len(widths) == 2 and len(mixer.inputs.groups[0].widths) == 2
    channels, value_width = mixer.taps.shape[1], mixer.value_heads * mixer.value_dim
    net = delta_net.Net(
        key_heads=mixer.key_heads,
        value_heads=mixer.value_heads,
        key_dim=mixer.key_dim,
        value_dim=mixer.value_dim,
        taps=mixer.taps.shape[0],
        norm_eps=mixer.eps,
        main_width=widths[0] if split else sum(widths),
        z_at=channels,
        ab_width=widths[1] if split else sum(widths),
        a_at=0 if split else channels + value_width,
    )
    if delta_form() != "auto" or not delta_net.fits(net):
        return None
    return delta_net.DeltaKernels(net, mixer.taps, mixer.log_a, mixer.dt_bias, mixer.norm)


class KernelDeltaLayer:
    """`DeltaLayer` with its mixer on kernels between plain products: for prompts, and for ranks."""

    def __init__(self, plain: DeltaLayer, kernels: delta_net.DeltaKernels, lengths: frozenset[str]):
        """`lengths` are those of `choices.LENGTHS` that the kernels read; the plain layer reads others."""
        self.plain, self._mixer, self._kernels, self._lengths = plain, plain.mixer, kernels, lengths
        self._compiled = fuse(self.forward)

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Map x [1, T, hidden] to the same shape; the states move on by T tokens."""
        if choices.length_of(x.shape[1]) not in self._lengths:
            return self.plain(x, cache)
        cache = as_delta_state(cache)
        forward = self._compiled if x.shape[1] == 1 else self.forward
        x, cache.conv, cache.state = forward(x, cache.conv, cache.state)
        return x

    def forward_speculative(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Run the plain layer, which keeps what `DeltaState.commit` needs."""
        return self.plain.forward_speculative(x, cache)

    def forward(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return the layer's output [1, T, hidden] and the two states after it."""
        normalised = self.plain.enter(x)[0]  # [T, hidden]
        projected = [group.joined(normalised) for group in self._mixer.inputs.groups]
        mixed, conv, state = self.run_kernels(projected, conv, state)
        return self.plain.leave(x, self._mixer.out(mixed)[None]), conv, state

    def run_kernels(
        self, projected: list[mx.array], conv: mx.array, state: mx.array, *, every: bool = False
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Map projections [T, ...], group by group, to outputs [T, Hv*Dv] and the two states after them.

        With `every`, for at most MAX_FUSED_ROWS tokens, return the states after each, along their first axis.
        """
        main, ab = [join(projected)] * 2 if self._kernels.net.a_at else projected
        if every:
            return self._kernels.steps(main, ab, conv, state, every=True)
        return self._kernels(main, ab, conv, state)


class FusedDeltaLayer(KernelDeltaLayer):
    """`KernelDeltaLayer` that takes a few tokens with kernels alone."""

    def __init__(
        self,
        plain: DeltaLayer,
        kernels: delta_net.DeltaKernels,
        lengths: frozenset[str],
        feed_forward: FusedFeedForward,
    ):
        super().__init__(plain, kernels, lengths)
        self._feed_forward = feed_forward
        self._input_norm, self._post_norm = layer_norms(plain)
        self._gates = small_products(plain.mixer, self._input_norm)
        self._compiled_fused = fuse(self.forward_fused)
        self._compiled_speculative = fuse(partial(self.forward_fused, every=True))

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Map x [1, T, hidden] to the same shape; the states move on by T tokens."""
        if x.shape[1] > MAX_FUSED_ROWS:
            return super().__call__(x, cache)
        cache = as_delta_state(cache)
        rows, cache.conv, cache.state = self._compiled_fused(x[0], cache.conv, cache.state)
        return rows[None]

    def forward_speculative(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Do the same for a few tokens; the kernel emits the states after each for `DeltaState.commit`."""
        if x.shape[1] > MAX_FUSED_ROWS:
            return super().forward_speculative(x, cache)
        cache = as_delta_state(cache)
        rows, *states = self._compiled_speculative(x[0], cache.conv, cache.state)
        cache.speculative = SpeculativeStates(*states)
        return rows[None]

    def forward_fused(
        self, x: mx.array, conv: mx.array, state: mx.array, *, every: bool = False
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Map x [T, hidden] and the two states before it to [T, hidden] and the two states after it.

        With `every` these are the states after each token, along their first axis.
        """
        if self._gates is None:
            projected = project(x, self._mixer.inputs, self._input_norm)
            mixed, conv, state = self.run_kernels(projected, conv, state, every=every)  # [T, Hv*Dv]
        else:
            main = fused_matvec.product(x, self._mixer.inputs.groups[0].weight, norm=self._input_norm)
            mixed, conv, state = self._kernels.steps_of(main, x, self._gates, conv, state, every=every)
        x = fused_matvec.product(mixed, self._mixer.out.weight, add=x)  # [T, hidden]
        return self._feed_forward(x, self._post_norm), conv, state


def small_products(mixer: GatedDeltaNet, norm: Norm) -> delta_net.Gates | None:
    """Return what the delta net's kernel needs to make a and b itself; None if that is another launch's.

    It is where the two are in one group of bfloat16 rows and our own products are the form in use.
    """
    if len(mixer.inputs.groups) != 2 or len(mixer.inputs.groups[1].widths) != 2:
        return None
    rows = mixer.inputs.groups[1].weight
    if isinstance(rows, Packed) or not fused_matvec.supports(rows):
        return None
    return delta_net.Gates(rows, norm.weight, norm.eps) if fused_matvec.uses_own_matvec(rows) else None


def project(x: mx.array, projections: Projections, norm: Norm) -> list[mx.array]:
    """Return the products of norm(x), x [T, hidden], with each group of weights: [T, N] each."""
    return [fused_matvec.product(x, group.weight, norm=norm) for group in projections.groups]


def join(parts: list[mx.array]) -> mx.array:
    """Return `parts` [T, N] side by side."""
    if len(parts) == 1:
        return parts[0]
    return join_rows(parts) if is_recorded() else mx.concatenate(parts, axis=-1)
