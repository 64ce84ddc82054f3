"""Every kernel at the dimensions of Qwen3.6-27B and 35B-A3B on this GPU, against float32: relative RMS.

`MLX_ENABLE_TF32=0 PYTHONPATH=.dev python tests/gpu/check_kernels.py [--rows 1 3 8]`. Ends with exit code 1 if
one of them is further off than LIMIT, which bfloat16 results and half products need.
"""

import argparse
import os
import sys
from collections.abc import Iterator

from qchat.core.checkpoint.packed import Geometry, Packed
from qchat.core.kernels import expert_routing
from qchat.core.kernels.decode_attention import Heads, attend, position, rope_frequencies, split_heads
from qchat.core.kernels.delta_net import MAX_STEPS, DeltaKernels, Gates, Net
from qchat.core.kernels.dequantize import dequantize
from qchat.core.kernels.tensor_product import tensor_product
from qchat.core.machine.backend import mx
from qchat.core.model.layers import convolve
from qchat.core.ops import fused_matvec
from qchat.core.ops.attention import attention
from qchat.core.ops.elementwise import decay_and_beta, gated_norm, l2_normalise
from qchat.core.ops.gated_delta import delta_chunks
from qchat.core.ops.linear import ExpertsLinear

LIMIT = 5e-3
EPS = 1e-6
WIDTH, INNER = 5120, 17408
GEOMETRIES = [
    *(Geometry(bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)),
    Geometry(4, 32, "affine"),
    Geometry(4, 128, "affine"),
    Geometry(4, 32, "mxfp4"),
    Geometry(8, 32, "mxfp8"),
    Geometry(4, 16, "nvfp4"),
]
HEADS = Heads(heads=24, kv_heads=4, rotary=64, norm_eps=EPS)
KEY_HEADS, VALUE_HEADS, DIM, TAPS = 16, 48, 128, 4
KEYS, VALUES = KEY_HEADS * DIM, VALUE_HEADS * DIM
CHANNELS = 2 * KEYS + VALUES
NET = Net(KEY_HEADS, VALUE_HEADS, DIM, DIM, TAPS, EPS, CHANNELS + VALUES, CHANNELS, 2 * VALUE_HEADS, 0)

Checks = Iterator[tuple[str, mx.array, mx.array]]


def wide(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


def normal(*shape: int, scale: float = 1.0) -> mx.array:
    return (scale * mx.random.normal(shape)).astype(mx.bfloat16)


def pack(geometry: Geometry | None, *shape: int) -> tuple[fused_matvec.Weight, mx.array]:
    """A random weight, and the float32 matrix that it stands for."""
    weight = normal(*shape, scale=shape[-1] ** -0.5)
    if geometry is None:
        return weight, wide(weight)
    parts = mx.quantize(weight, geometry.group_size, geometry.bits, mode=geometry.mode)
    biases = parts[2] if len(parts) > 2 else None
    packed = Packed(parts[0], parts[1], biases, geometry.group_size, geometry.bits, geometry.mode)
    return packed, packed.dequantize(mx.float32)


def rms_norm(x: mx.array, norm: fused_matvec.Norm) -> mx.array:
    return mx.fast.rms_norm(wide(x), norm.weight, norm.eps)


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def products(rows: list[int]) -> Checks:
    """The fused forms of each weight format, for each number of rows."""
    norm = fused_matvec.Norm(1 + 0.2 * mx.random.normal((WIDTH,)), EPS)
    for geometry in [*GEOMETRIES, None]:
        name = str(geometry or "bfloat16")
        (gate, gate32), (up, up32) = pack(geometry, INNER, WIDTH), pack(geometry, INNER, WIDTH)
        down, down32 = pack(geometry, WIDTH, INNER)
        for n in rows:
            x, h = normal(n, WIDTH), normal(n, INNER)
            seen = rms_norm(x, norm)
            yield f"{name}: norm, {n} rows", fused_matvec.logits(x, gate, norm=norm), seen @ gate32.T
            wanted = silu(seen @ gate32.T) * (seen @ up32.T)
            yield f"{name}: norm, gate and up, {n} rows", fused_matvec.gate_up(x, gate, up, norm=norm), wanted
            yield (
                f"{name}: residual, {n} rows",
                fused_matvec.product(h, down, add=x),
                wide(x) + wide(h) @ down32.T,
            )
        if isinstance(gate, Packed):
            yield f"{name}: as bfloat16", dequantize(gate), gate32


def prompts() -> Checks:
    """Products of a prompt's rows, and of those of 35B-A3B sorted by expert, in both forms."""
    count, width, inner = 256, 2048, 512
    index = mx.sort(mx.random.randint(0, count, (2000,)).astype(mx.uint32))
    for geometry in GEOMETRIES:
        for outputs, columns in ((INNER, WIDTH), (WIDTH, INNER)):
            weight, weight32 = pack(geometry, outputs, columns)
            x = normal(40, columns)
            name = f"{geometry}: {outputs} outputs, 40 rows"
            yield name, tensor_product(x, weight), wide(x) @ weight32.T  # pyright: ignore[reportArgumentType]
    for geometry in (Geometry(4, 64, "affine"), Geometry(8, 32, "mxfp8"), Geometry(4, 16, "nvfp4")):
        weight, weight32 = pack(geometry, count, inner, width)
        x = normal(index.size, width)
        parts = [slice(first, first + 50) for first in range(0, index.size, 50)]
        wanted = mx.concatenate([weight32[index[part]] @ wide(x)[part, :, None] for part in parts])
        for form, stored in (("packed", weight), ("dense", weight32.astype(mx.bfloat16))):
            found = ExpertsLinear(stored)(x[:, None], index, True)
            yield f"{geometry}: sorted rows, {form} experts", found[:, 0], wanted[:, :, 0]


def experts() -> Checks:
    """The block of 35B-A3B, two rows."""
    rows, width, inner, count, top = 2, 2048, 512, 256, 8
    norm = fused_matvec.Norm(1 + 0.2 * mx.random.normal((width,)), EPS)
    x = normal(rows, width)
    seen = rms_norm(x, norm)
    router, router32 = pack(Geometry(8, 64, "affine"), count + 1, width)
    logits = fused_matvec.logits(x, router, norm=norm)
    yield "router", logits, seen @ router32.T
    ids, shares, shared = expert_routing.route(logits, top, renormalise=True)
    order = mx.argsort(-logits[:, :count], axis=-1)[:, :top]
    chosen = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1)
    yield "shares", shares.reshape(rows, top), chosen
    yield "share of the shared expert", shared, mx.sigmoid(logits[:, count])
    for geometry in (Geometry(4, 64, "affine"), Geometry(8, 32, "mxfp8"), Geometry(4, 16, "nvfp4")):
        (gate, gate32), (up, up32) = (pack(geometry, count + 1, inner, width) for _ in range(2))
        down, down32 = pack(geometry, count, width, inner)
        hidden = fused_matvec.experts_gate_up(x, gate, up, ids, top, norm=norm)
        of = mx.repeat(seen, top, axis=0)[:, :, None]
        wanted = (silu(gate32[ids] @ of) * (up32[ids] @ of))[:, :, 0]
        yield f"{geometry}: experts' gate and up", hidden, wanted
        router = expert_routing.Router(count, top, renormalise=True)
        routed, all_ids, all_shares = fused_matvec.routed_gate_up(x, gate, up, logits, router, norm=norm)
        yield f"{geometry}: routed in the same launch", routed.reshape(rows, top + 1, inner)[:, :top], wanted
        last = silu(seen @ gate32[count].T) * (seen @ up32[count].T)
        yield f"{geometry}: shared in the same launch", routed.reshape(rows, top + 1, inner)[:, top], last
        yield f"{geometry}: their ids", all_ids.reshape(rows, top + 1)[:, :top], ids.reshape(rows, top)
        yield f"{geometry}: their shares", all_shares.reshape(rows, top + 1)[:, top], shared
        parts = shares[:, None] * (down32[ids] @ wide(hidden)[:, :, None])[:, :, 0]
        wanted = wide(x) + parts.reshape(rows, top, width).sum(axis=1)
        yield (
            f"{geometry}: experts' sum",
            fused_matvec.experts_sum(hidden, down, ids, shares, top, add=x),
            wanted,
        )


def delta_net(lengths: list[int]) -> Checks:
    conv, state = normal(1, TAPS - 1, CHANNELS), mx.random.normal((1, VALUE_HEADS, DIM, DIM))
    taps, norm = normal(TAPS, CHANNELS, scale=0.4), 1 + 0.2 * mx.random.normal((DIM,))
    log_a, dt_bias = mx.random.normal((VALUE_HEADS,)), mx.random.normal((VALUE_HEADS,))
    kernels = DeltaKernels(NET, taps, log_a, dt_bias, norm)
    for length in lengths:
        main, ab = normal(length, NET.main_width), normal(length, NET.ab_width)
        window = mx.concatenate([wide(conv), wide(main)[None, :, :CHANNELS]], axis=1)
        qk, v = mx.split(convolve(window, wide(taps)), [2 * KEYS], axis=-1)
        qk = l2_normalise(qk.reshape(1, length, 2, KEY_HEADS, DIM))
        g, beta = decay_and_beta(ab[None, :, :VALUE_HEADS], ab[None, :, VALUE_HEADS:], log_a, dt_bias)
        v = v.reshape(1, length, VALUE_HEADS, DIM)
        output, after = delta_chunks(qk[:, :, 0] * DIM**-0.5, qk[:, :, 1], v, g, beta, state, 64)
        z = main[None, :, CHANNELS:].reshape(v.shape)
        found, new_conv, new_state = kernels(main, ab, conv, state)
        if length <= MAX_STEPS:
            yield from small_products(kernels, main, conv, state)
        yield f"delta net, {length} positions", found, gated_norm(output, norm, z, EPS).reshape(length, -1)
        yield f"its state after {length}", new_state, after
        yield f"its convolution after {length}", new_conv, window[:, length:]


def small_products(kernels: DeltaKernels, main: mx.array, conv: mx.array, state: mx.array) -> Checks:
    """Decay and beta made from the layer's input in the same launch, against a product before it."""
    x, rows = normal(len(main), WIDTH), normal(2 * VALUE_HEADS, WIDTH, scale=WIDTH**-0.5)
    norm = fused_matvec.Norm(1 + 0.2 * mx.random.normal((WIDTH,)), EPS)
    ab = rms_norm(x, norm) @ wide(rows).T
    wanted, _, wanted_state = kernels.steps(main, ab.astype(mx.bfloat16), conv, state)
    gates = Gates(rows, norm.weight, norm.eps)
    found, _, new_state = kernels.steps_of(main, x, gates, conv, state)
    yield f"delta net with its small products, {len(main)} positions", found, wanted
    yield f"its state after {len(main)} of them", new_state, wanted_state


def attends(lengths: list[int]) -> Checks:
    q_norm, k_norm = (1 + 0.2 * mx.random.normal((256,)) for _ in range(2))
    frequencies, steps = rope_frequencies(HEADS.rotary, 1e7), 2
    main = normal(steps, HEADS.width)
    for length in lengths:
        offset = position(length - steps)
        q, *_ = split_heads(HEADS, main, q_norm, k_norm, frequencies, offset)
        of_query = main[:, : HEADS.heads * 512].reshape(steps, HEADS.heads, 2, 256)
        plain = mx.fast.rms_norm(wide(of_query[:, :, 0]).swapaxes(0, 1)[None], q_norm, EPS)
        rotate = {"traditional": False, "base": 1e7, "scale": 1.0, "offset": length - steps}
        yield f"queries at {length}", q, mx.fast.rope(plain, HEADS.rotary, **rotate)
        capacity = -(-length // 256) * 256
        keys, values = (normal(1, HEADS.kv_heads, capacity, 256) for _ in range(2))
        found = attend(HEADS, main, q, keys, values, offset)
        seen, heard = (wide(x[:, :, :length]) for x in (keys, values))
        mixed = attention(wide(q), seen, heard, 256**-0.5)[0].swapaxes(0, 1)
        gate = mx.sigmoid(wide(of_query[:, :, 1]))
        yield f"attention over {length}", found, (mixed * gate).reshape(found.shape)


def relative_rms(found: mx.array, wanted: mx.array) -> float:
    found, wanted = wide(found).reshape(wanted.shape), wide(wanted)
    return float(mx.sqrt(mx.square(found - wanted).mean() / mx.square(wanted).mean()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare every kernel with float32 on this GPU.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 3, 8])
    parser.add_argument("--formats", type=int, default=len(GEOMETRIES), help="only the first so many")
    args = parser.parse_args()
    if os.environ.get("MLX_ENABLE_TF32") != "0":
        parser.error("wanted MLX_ENABLE_TF32=0: float32 products would keep ten bits")
    del GEOMETRIES[args.formats :]
    worst = 0.0
    kinds = delta_net([1, 2, 8, 9, 700]), attends([2, 300, 5000]), experts(), prompts(), products(args.rows)
    for checks in kinds:
        for name, found, wanted in checks:
            error = relative_rms(found, wanted)
            worst = max(worst, error)
            print(f"{name:55}{error:.1e}{'  TOO FAR' if not error <= LIMIT else ''}", flush=True)
    print(f"worst {worst:.1e}, limit {LIMIT:.0e}")
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
