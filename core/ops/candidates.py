"""The contests: each operation on the shapes of one model, in every form that exists on this device.

A contest draws random arguments, and has a reference in float32 for the results. Forms are `mlx` (MLX's own
operations), `chunked` (the delta rule in products) and `ours` (`core/kernels`). To run one may crash or hang
where nobody tried the device before: `race` does so in a process of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..checkpoint.config import ModelConfig
from ..checkpoint.packed import Geometry, Packed
from ..kernels import decode_attention, delta_net
from ..kernels.dequantize import dequantize
from ..kernels.expert_routing import MAX_EXPERTS, Router
from ..kernels.launch import may_try
from ..machine.backend import DTYPES, Policy, mx, on_gpu
from . import choices, fused_matvec
from .attention import attention
from .elementwise import decay_and_beta, gated_norm, l2_normalise, silu, swiglu
from .gated_delta import CPU_CHUNK, GPU_CHUNK, delta_chunks, delta_mlx, delta_step
from .gated_delta_reference import gated_delta_rule
from .linear import ExpertsLinear

# relative RMS against float32: rounding alone gives 4e-3 in bfloat16, 3e-6 in float32
LIMITS = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 2e-2}
EPS = 1e-6
CAPACITY, OFFSET = 1024, 1000  # of the cache that attention reads
FEW_EXPERTS = 32  # stand for all: each is read by itself
CPU_PROMPT = 64  # where forms may need hundreds of milliseconds

Rule = Callable[..., tuple[mx.array, mx.array]]
Form = Callable[[], Sequence[mx.array]]


@dataclass(frozen=True)
class Contest:
    """One operation on one shape; the first of `forms` is the usual one. Results are compared in order."""

    operation: str
    shape: str
    limit: float
    wanted: Form
    forms: Mapping[str, Form]


@dataclass(frozen=True)
class Dimensions:
    """What contests need to know of a model.

    `products` has outputs N, columns K and the format of one matrix [N, K] of each format; `experts` is the
    number of experts, the top, outputs, columns and the format. A format is bits, group size and mode, or
    None if dense.
    """

    dtype: str
    delta: tuple[int, int, int, int, int]  # Hk, Dk, Hv, Dv, taps
    attention: tuple[int, int, int, int]  # H, Hkv, D, rotary
    products: tuple[tuple[int, int, tuple[int, int, str] | None], ...] = ()
    experts: tuple[int, int, int, int, tuple[int, int, str] | None] | None = None

    @classmethod
    def of(cls, config: ModelConfig, tensors: Mapping[str, Any], policy: Policy) -> "Dimensions":
        """Describe the model whose tensors have these shapes; on a CPU nothing but its delta net."""
        delta = (
            config.linear_num_key_heads,
            config.linear_key_head_dim,
            config.linear_num_value_heads,
            config.linear_value_head_dim,
            config.linear_conv_kernel_dim,
        )
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rotary_dim)
        dtype = next(name for name, value in DTYPES.items() if value == policy.activations)
        if may_try() is None:
            return cls(dtype, delta, heads)
        return cls(dtype, delta, heads, _products(tensors, policy), _experts(config, tensors, policy))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Dimensions":
        """Rebuild what `as_json` gave, whose tuples JSON has made lists."""
        return cls(**{name: _as_tuple(value) for name, value in given.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _products(tensors: Mapping[str, Any], policy: Policy) -> tuple[Any, ...]:
    """Return the largest matrix of each format in the layers."""
    largest: dict[Any, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        shape = tensor.shape
        if len(shape) == 2 and name.startswith("layers.") and not name.endswith("conv1d"):
            stored = None if policy.dense else _format(tensor)
            largest[stored] = max(largest.get(stored, (0, 0)), (shape[0], shape[1]))
    return tuple((*shape, stored) for stored, shape in largest.items())


def _experts(config: ModelConfig, tensors: Mapping[str, Any], policy: Policy) -> tuple[Any, ...] | None:
    if not config.is_moe:
        return None
    gate = next((t for name, t in tensors.items() if "switch_mlp.gate_proj" in name), None)
    stored = None if gate is None or policy.dense else _format(gate)
    return (
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.hidden_size,
        stored,
    )


def _format(tensor: Any) -> tuple[int, int, str] | None:
    return (tensor.bits, tensor.group_size, tensor.mode) if isinstance(tensor, Packed) else None


def contests(dimensions: Dimensions) -> Iterator[Contest]:
    """Yield the contests of one model that have more than one form here."""
    for found in _all_contests(dimensions):
        if len(found.forms) > 1:
            yield found


def _all_contests(d: Dimensions) -> Iterator[Contest]:
    for length in choices.LENGTHS:
        yield delta_contest(d, length)
    if _ours(d):
        for rows in (1, 4):
            yield from (product_contest(d, rows, *product) for product in d.products)
        yield from (dequantize_contest(d, *product) for product in d.products if product[2])
        yield attention_contest(d)
        if d.experts is not None:
            yield experts_contest(d, *d.experts)


def _ours(d: Dimensions) -> bool:
    return may_try() is not None and d.dtype == "bfloat16"


def _normal(d: Dimensions, *shape: int, scale: float = 1.0) -> mx.array:
    return (scale * mx.random.normal(shape)).astype(DTYPES[d.dtype])


def _wide(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


# the delta net between its projections


def delta_contest(d: Dimensions, length: str) -> Contest:
    """Convolution, norms, the rule and the gated norm of one layer, from its projections on."""
    key_heads, key_dim, heads, value_dim, taps = d.delta
    channels, values = 2 * key_heads * key_dim + heads * value_dim, heads * value_dim
    net = delta_net.Net(
        key_heads, heads, key_dim, value_dim, taps, EPS, channels + values, channels, 2 * heads, 0
    )
    tokens = choices.LENGTHS[length]
    tokens = tokens if on_gpu() or tokens <= choices.FEW else min(tokens, CPU_PROMPT)
    main, ab = _normal(d, tokens, net.main_width), _normal(d, tokens, net.ab_width)
    conv, state = _normal(d, 1, taps - 1, channels), mx.random.normal((1, heads, key_dim, value_dim))
    weights, norm = _normal(d, taps, channels, scale=0.4), 1 + 0.1 * mx.random.normal((value_dim,))
    log_a, dt_bias = mx.random.normal((heads,)), mx.random.normal((heads,))
    chunk = GPU_CHUNK if on_gpu() else CPU_CHUNK

    def plain(rule: Rule) -> Form:
        return lambda: _delta_net(net, rule, main, ab, conv, state, weights, log_a, dt_bias, norm)

    chunked: Rule = delta_step if tokens == 1 else partial(delta_chunks, chunk=chunk)
    forms: dict[str, Form] = {"chunked": plain(chunked)}
    if hasattr(mx.fast, "gated_delta_update"):
        forms["mlx"] = plain(delta_mlx)
    if _ours(d) and delta_net.fits(net):
        kernels = delta_net.DeltaKernels(net, weights, log_a, dt_bias, norm)
        forms[choices.OURS] = lambda: kernels(main, ab, conv, state)
    shape = choices.delta_shape(key_heads, key_dim, heads, value_dim)
    operation = choices.delta_operation(length)
    return Contest(operation, shape, LIMITS[d.dtype], plain(gated_delta_rule), forms)


def _delta_net(
    net: delta_net.Net,
    rule: Rule,
    main: mx.array,
    ab: mx.array,
    conv: mx.array,
    state: mx.array,
    taps: mx.array,
    log_a: mx.array,
    dt_bias: mx.array,
    norm: mx.array,
) -> Sequence[mx.array]:
    """Return outputs, convolution's state and recurrent state by plain operations in float32."""
    length, keys, heads = main.shape[0], net.key_heads * net.key_dim, net.value_heads
    window = mx.concatenate([conv, main[None, :, : net.channels]], axis=1)
    seen, taps = _wide(window), _wide(taps)
    first = seen[:, :length] * taps[0]
    mixed = silu(sum((seen[:, i : i + length] * taps[i] for i in range(1, net.taps)), first))
    qk = l2_normalise(mixed[..., : 2 * keys].reshape(1, length, 2, net.key_heads, net.key_dim))
    v = mixed[..., 2 * keys :].reshape(1, length, heads, net.value_dim)
    g, beta = decay_and_beta(ab[None, :, :heads], ab[None, :, heads:], log_a, dt_bias)
    output, after = rule(qk[:, :, 0] * net.key_dim**-0.5, qk[:, :, 1], v, g, beta, state)
    gate = main[None, :, net.z_at :].reshape(v.shape)
    return gated_norm(output, norm, gate, EPS).reshape(length, -1), window[:, length:], after


# products


def _weight(d: Dimensions, stored: tuple[int, int, str] | None, *shape: int) -> fused_matvec.Weight:
    dense = _normal(d, *shape, scale=shape[-1] ** -0.5)
    if stored is None:
        return dense
    bits, group, mode = stored
    words, scales, *biases = mx.quantize(dense, group, bits, mode=mode)
    return Packed(words, scales, biases[0] if biases else None, group, bits, Geometry(bits, group, mode).mode)  # pyright: ignore[reportArgumentType]


def _dense(weight: fused_matvec.Weight) -> mx.array:
    return weight.dequantize(mx.float32) if isinstance(weight, Packed) else _wide(weight)


def product_contest(
    d: Dimensions, rows: int, outputs: int, columns: int, stored: tuple[int, int, str] | None
) -> Contest:
    """A product of a few rows with the norm before it and the residual behind it."""
    weight, x, add = (
        _weight(d, stored, outputs, columns),
        _normal(d, rows, columns),
        _normal(d, rows, outputs),
    )
    norm = fused_matvec.Norm(1 + 0.1 * mx.random.normal((columns,)), EPS)

    def wanted() -> Sequence[mx.array]:
        return [_wide(add) + mx.fast.rms_norm(_wide(x), norm.weight, EPS) @ _dense(weight).T]

    forms: dict[str, Form] = {"mlx": lambda: [fused_matvec.mlx_form(x, weight, norm=norm, add=add)]}
    if fused_matvec.supports(weight):
        forms[choices.OURS] = lambda: [fused_matvec.own_form(x, weight, norm=norm, add=add)]
    return Contest(
        choices.product_operation(rows), choices.weight_format(weight), LIMITS[d.dtype], wanted, forms
    )


def dequantize_contest(
    d: Dimensions, outputs: int, columns: int, stored: tuple[int, int, str] | None
) -> Contest:
    """A packed weight written out, for products of many rows."""
    weight = _weight(d, stored, outputs, columns)
    assert isinstance(weight, Packed)
    forms: dict[str, Form] = {"mlx": lambda: [weight.dequantize(mx.bfloat16)]}
    if fused_matvec.supports(weight):
        forms[choices.OURS] = lambda: [dequantize(weight)]
    shape = choices.weight_format(weight)
    return Contest("dequantized weight", shape, LIMITS[d.dtype], lambda: [_dense(weight)], forms)


def attention_contest(d: Dimensions) -> Contest:
    """One query against a cache of OFFSET + 1 positions, from its projections on."""
    heads, kv_heads, dim, rotary = d.attention
    sizes = decode_attention.Heads(heads, kv_heads, rotary, EPS)
    main, offset = _normal(d, 1, 2 * (heads + kv_heads) * dim), decode_attention.position(OFFSET)
    norm = 1 + 0.1 * mx.random.normal((dim,))
    keys, values = (_normal(d, 1, kv_heads, CAPACITY, dim) for _ in range(2))

    def plain(convert: Callable[[mx.array], mx.array]) -> Form:
        def run() -> Sequence[mx.array]:
            query, gate = mx.split(
                convert(main)[:, : 2 * heads * dim].reshape(1, heads, 1, 2 * dim), 2, axis=-1
            )
            query = mx.fast.rms_norm(query, convert(norm), EPS)
            query = mx.fast.rope(query, rotary, traditional=False, base=1e4, scale=1.0, offset=OFFSET)
            seen, held = (convert(x[:, :, : OFFSET + 1]) for x in (keys, values))
            return [(attention(query, seen, held, dim**-0.5) * mx.sigmoid(gate)).reshape(1, -1)]

        return run

    def ours() -> Sequence[mx.array]:
        turns = decode_attention.rope_frequencies(rotary, 1e4)
        query, _, _ = decode_attention.split_heads(sizes, main, norm, norm, turns, offset)
        return [decode_attention.attend(sizes, main, query, keys, values, offset)]

    forms: dict[str, Form] = {"mlx": plain(lambda x: x.astype(main.dtype))}
    if decode_attention.fits(sizes, dim):
        forms[choices.OURS] = ours
    shape = choices.attention_shape(heads, kv_heads, dim)
    return Contest("attention, 1 token", shape, LIMITS[d.dtype], plain(_wide), forms)


def experts_contest(
    d: Dimensions, count: int, top: int, inner: int, width: int, stored: tuple[int, int, str] | None
) -> Contest:
    """The experts of one token, router's logits given; FEW_EXPERTS stand for all, the last for the shared."""
    some = min(count, FEW_EXPERTS)
    taken = min(top, some - 1)
    gate, up = (_weight(d, stored, some, inner, width) for _ in range(2))
    down, x, logits = (
        _weight(d, stored, some, width, inner),
        _normal(d, 1, width),
        mx.random.normal((1, some)),
    )

    def mixed(shares: mx.array, output: mx.array) -> mx.array:
        return (shares[:, None] * output).sum(axis=0, keepdims=True)

    def best() -> tuple[mx.array, mx.array]:
        order = mx.argsort(-logits[0, :-1])[:taken]
        shares = mx.softmax(logits[0][order], axis=-1)
        return (
            mx.concatenate([order, mx.array([some - 1], order.dtype)]),
            mx.concatenate([shares, mx.sigmoid(logits[0, -1:])]),
        )

    def wanted() -> Sequence[mx.array]:
        order, shares = best()
        seen = _wide(x)[0]
        hidden = silu(_dense(gate)[order] @ seen) * (_dense(up)[order] @ seen)  # [top, inner]
        output = (_dense(down)[order] @ hidden[..., None])[..., 0]
        return [_wide(x) + mixed(shares, output)]

    def by_mlx() -> Sequence[mx.array]:
        order, shares = best()
        rows = mx.repeat(x, taken + 1, axis=0)[:, None]
        hidden = swiglu(ExpertsLinear(gate)(rows, order, False), ExpertsLinear(up)(rows, order, False))
        output = ExpertsLinear(down)(hidden, order, False)[:, 0]
        return [x + mixed(shares.astype(x.dtype), output)]

    def ours() -> Sequence[mx.array]:
        router = Router(some - 1, taken, renormalise=True)
        hidden, ids, shares = fused_matvec.routed_gate_up(x, gate, up, logits, router)
        return [fused_matvec.experts_sum(hidden, down, ids, shares, taken + 1, add=x)]

    forms: dict[str, Form] = {"mlx": by_mlx}
    if fused_matvec.supports(gate, up) and fused_matvec.supports(down) and count <= MAX_EXPERTS:
        forms[choices.OURS] = ours
    return Contest(
        "experts, 1 token", choices.experts_shape(count, top, gate), LIMITS[d.dtype], wanted, forms
    )
