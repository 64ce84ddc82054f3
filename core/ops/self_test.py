"""The GPU kernels' self test: they must reproduce known results before the device is trusted with them.

Nobody has tried every GPU and every version of MLX's and the vendors' compilers. Where a kernel does not
compile, or is off by more than rounding, none of them is used, and one sentence says so. A passed test is
remembered in the cache folder.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from ..checkpoint.packed import Packed
from ..kernels import decode_attention, delta_net, matvec
from ..kernels.compile_cache import compiler_version
from ..kernels.dequantize import dequantize, dequantize_kernel
from ..kernels.expert_routing import route, route_kernel
from ..kernels.launch import Kernel, backend, distrust, texts
from ..machine.backend import mx
from ..machine.files import cache_path
from . import fused_matvec
from .attention import attention
from .elementwise import decay_and_beta, gated_norm, l2_normalise, silu
from .gated_delta import delta_chunks

LIMIT = 2e-2  # relative RMS; rounding alone gives 2e-3
EPS = 1e-6
EXPERTS, TOP = 4, 2
NET = delta_net.Net(
    key_heads=1,
    value_heads=2,
    key_dim=32,
    value_dim=32,
    taps=4,
    norm_eps=EPS,
    main_width=192,
    z_at=128,
    ab_width=4,
    a_at=0,
)
HEADS = decode_attention.Heads(heads=4, kv_heads=2, rotary=64, norm_eps=EPS)

Pairs = Iterator[tuple[mx.array, mx.array]]


@cache
def run_self_test() -> str | None:
    """Test the kernels unless these texts passed on this device and MLX before; tell `backend()` the verdict.

    Returns a sentence for the user if they failed, None otherwise.
    """
    if backend() is None:
        return None
    verdict = _verdict_file()
    if verdict is not None and verdict.exists():
        return None
    try:
        errors = [_relative_rms(found, wanted) for found, wanted in _samples()]
    except (RuntimeError, ValueError) as problem:
        distrust()
        reason = " ".join(str(problem).split())[:200]
        return f"qchat's GPU kernels do not run here, so MLX's own are used: {reason}"
    bad = [error for error in errors if not error <= LIMIT]  # NaN is bad, too
    if bad:
        distrust()
        return f"qchat's GPU kernels are off by {max(bad):.0%} here, so MLX's own are used"
    if verdict is not None:
        with suppress(OSError):  # the next process tests them again
            verdict.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            verdict.touch()
    return None


def _verdict_file() -> Path | None:
    """Return the file whose existence says that the test was passed; None for a user without a home."""
    device = mx.device_info()
    about = [version("mlx"), str(device.get("device_name")), str(device.get("architecture"))]
    about += [part for kernel in _kernels() for part in texts(kernel, backend() or "metal")]
    # products with experts are tested only where our matvec kernel is used
    about += [compiler_version(), f"products: {fused_matvec.uses_own_matvec()}"]
    digest = hashlib.sha256("\0".join(about).encode()).hexdigest()[:16]
    folder = cache_path("kernels")
    return folder / f"{digest}.passed" if folder else None


def _kernels() -> list[Kernel]:
    """Return one kernel of each source text that the samples run."""
    packed = _packed(40, 256)
    shape = matvec.Shape(packed.geometry, 256, rows=2, sides=2, norm_eps=EPS)
    return [
        matvec.matvec_kernel(shape, matvec.choose_tiling(shape, 40), 2),
        dequantize_kernel(packed.geometry, 2),
        delta_net.steps_kernel(NET, every=False),
        delta_net.mix_kernel(NET, 32),
        delta_net.walk_kernel(NET),
        delta_net.norm_kernel(NET),
        decode_attention.split_kernel(HEADS),
        decode_attention.attend_kernel(HEADS, 4),
        decode_attention.join_kernel(HEADS, 4),
        route_kernel(EXPERTS, TOP, renormalise=True),
    ]


def _samples() -> Pairs:
    """Yield pairs of a kernel's result and the result of MLX's operations."""
    yield from _product_samples()
    yield from _delta_net_samples(2)
    yield from _delta_net_samples(delta_net.MAX_STEPS + 1)
    yield from _attention_samples()
    if fused_matvec.uses_own_matvec():
        yield from _expert_samples()


def _packed(*shape: int) -> Packed:
    parts = mx.quantize(_normal(*shape) / 16, 64, 4)
    return Packed(*parts, 64, 4, "affine")


def _product_samples() -> Pairs:
    packed, x, norm = (
        _packed(40, 256),
        _normal(2, 256),
        fused_matvec.Norm(1 + 0.1 * mx.random.normal((256,)), EPS),
    )
    dense = packed.dequantize(mx.float32)
    yield dequantize(packed), dense
    y = norm(x).astype(mx.float32) @ dense.T
    yield fused_matvec.gate_up(x, packed, packed, norm=norm), silu(y) * y


def _delta_net_samples(length: int) -> Pairs:
    net = NET
    main, ab = _normal(length, net.main_width), _normal(length, net.ab_width)
    conv, state = _normal(1, 3, net.channels), mx.random.normal((1, 2, 32, 32))
    taps = _normal(4, net.channels).astype(mx.float32)
    log_a, dt_bias, norm = mx.random.normal((2,)), mx.random.normal((2,)), 1 + 0.1 * mx.random.normal((32,))
    window = mx.concatenate([conv, main[None, :, : net.channels]], axis=1).astype(mx.float32)
    mixed = silu(
        sum((window[:, i : i + length] * taps[i] for i in range(1, 4)), window[:, :length] * taps[0])
    )
    qk = l2_normalise(mixed[..., :64].reshape(1, length, 2, 1, 32))
    v = mixed[..., 64:].reshape(1, length, 2, 32)
    g, beta = decay_and_beta(ab[None, :, :2], ab[None, :, 2:], log_a, dt_bias)
    output, after = delta_chunks(qk[:, :, 0] * 32**-0.5, qk[:, :, 1], v, g, beta, state, 16)
    kernels = delta_net.DeltaKernels(NET, taps.astype(mx.bfloat16), log_a, dt_bias, norm)
    found, new_conv, new_state = kernels(main, ab, conv, state)
    gate = main[None, :, net.z_at :].reshape(v.shape)
    yield found, gated_norm(output, norm, gate, EPS).reshape(length, -1)
    yield new_conv, window[:, length:]
    yield new_state, after


def _expert_samples() -> Pairs:
    x, logits = _normal(2, 256), mx.random.normal((2, EXPERTS + 1))
    ids, shares, shared = route(logits, TOP, renormalise=True)
    best = mx.take_along_axis(logits, mx.argsort(-logits[:, :EXPERTS], axis=-1)[:, :TOP], axis=-1)
    yield shares.reshape(2, TOP), mx.softmax(best, axis=-1)
    yield shared, mx.sigmoid(logits[:, EXPERTS])
    up, down = _packed(EXPERTS, 64, 256), _packed(EXPERTS, 256, 64)
    hidden = fused_matvec.experts_gate_up(x, up, up, ids, TOP)
    y = _times(up, ids, mx.repeat(x, TOP, axis=0))
    yield hidden, silu(y) * y
    parts = (shares[:, None] * _times(down, ids, hidden)).reshape(2, TOP, 256)
    yield fused_matvec.experts_sum(hidden, down, ids, shares, TOP, add=x), x + parts.sum(axis=1)


def _times(stack: Packed, ids: mx.array, x: mx.array) -> mx.array:
    """Multiply each row of x [R, K] with the matrix of `stack` [E, N, K] that ids [R] name: [R, N]."""
    return (stack.dequantize(mx.float32)[ids] @ x.astype(mx.float32)[:, :, None])[:, :, 0]


def _attention_samples() -> Pairs:
    main, norm, offset = _normal(1, HEADS.width), 1 + 0.1 * mx.random.normal((256,)), 150
    q, _, _ = decode_attention.split_heads(
        HEADS, main, norm, norm, decode_attention.rope_frequencies(64, 1e4), decode_attention.position(offset)
    )
    queries = main[:, : HEADS.heads * 512].reshape(1, HEADS.heads, 2, 256)
    plain = mx.fast.rms_norm(queries[:, :, 0].swapaxes(0, 1)[None].astype(mx.float32), norm, EPS)
    yield q, mx.fast.rope(plain, 64, traditional=False, base=1e4, scale=1.0, offset=offset)
    keys, values = (_normal(1, HEADS.kv_heads, 256, 256) for _ in range(2))
    found = decode_attention.attend(HEADS, main, q, keys, values, decode_attention.position(offset))
    seen = [x[:, :, : offset + 1].astype(mx.float32) for x in (keys, values)]
    mixed = attention(q.astype(mx.float32), seen[0], seen[1], 1 / 16)[0].swapaxes(0, 1)
    yield found, (mixed * mx.sigmoid(queries[:, :, 1].astype(mx.float32))).reshape(1, -1)


def _normal(*shape: int) -> mx.array:
    return mx.random.normal(shape).astype(mx.bfloat16)


def _relative_rms(found: mx.array, wanted: mx.array) -> float:
    found, wanted = found.astype(mx.float32).reshape(wanted.shape), wanted.astype(mx.float32)
    return float(mx.sqrt(mx.square(found - wanted).mean() / mx.square(wanted).mean()))
