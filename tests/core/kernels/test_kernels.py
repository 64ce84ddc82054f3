"""The kernels' text: the same body for both backends, and what it computes, run on the CPU as Metal."""

import itertools
import math
import re
from dataclasses import replace
from functools import partialmethod
from typing import Any

import numpy as np
import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.packed import Geometry, Mode, Packed
from qchat.core.errors import UsageError
from qchat.core.kernels import (
    decode_attention,
    delta_net,
    dequantize,
    expert_routing,
    launch,
    matvec,
    recording,
    rows,
    tensor_product,
)
from qchat.core.kernels.unpack import unpacking
from qchat.core.machine.backend import mx
from qchat.core.model.layers import convolve
from qchat.core.ops import fused_matvec, linear
from qchat.core.ops.elementwise import decay_and_beta, gated_norm, l2_normalise
from qchat.core.ops.gated_delta_reference import gated_delta_rule
from qchat.core.ops.linear import ExpertsLinear, make_linear
from qchat.core.ops.rotary import Rotary
from tests.checkpoints import tiny_config
from tests.compare import relative_rms
from tests.core.kernels import on_cpu
from tests.core.kernels.on_cpu import needs_a_compiler

AFFINE = [Geometry(bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)]
MODES: dict[Mode, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
FLOATS = [Geometry(bits, group, mode) for mode, (bits, group) in MODES.items()]
GROUPS = [Geometry(4, 32, "affine"), Geometry(4, 128, "affine")]
EPS = 1e-6
# of bfloat16 results: half the distance of neighbours is 2^-9, and products are halves
LIMIT = 4e-3
NET = delta_net.Net(
    key_heads=2,
    value_heads=6,
    key_dim=32,
    value_dim=32,
    taps=4,
    norm_eps=EPS,
    main_width=2 * 2 * 32 + 2 * 6 * 32,
    z_at=2 * 2 * 32 + 6 * 32,
    ab_width=12,
    a_at=0,
)
HEADS = decode_attention.Heads(heads=6, kv_heads=2, rotary=64, norm_eps=EPS)


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCHAT_TUNE", "auto")


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run as Metal through a shim, and whoever asks finds a device that takes them."""
    monkeypatch.setattr(launch.Kernel, "__call__", on_cpu.run)
    monkeypatch.setattr(launch, "_device", lambda: "cuda")
    monkeypatch.setenv("QCHAT_KERNELS", "on")


@pytest.fixture
def on_the_cpu_as_cuda(monkeypatch: pytest.MonkeyPatch, on_the_cpu: None) -> None:  # noqa: ARG001
    monkeypatch.setattr(launch.Kernel, "__call__", partialmethod(on_cpu.run, backend="cuda"))


def every_kernel() -> list[launch.Kernel]:
    """One of each text."""
    tiling = matvec.Tiling(at_once=4, outputs=8, threads=32)
    shapes = [matvec.Shape(g, 1024, rows=2, sides=2, norm_eps=EPS) for g in [*AFFINE, *FLOATS, None]]
    shapes += [
        matvec.Shape(AFFINE[2], 1024, adds=True, experts=e, top=2) for e in ("each", "summed", "shared")
    ]
    router = expert_routing.Router(7, 2, True)
    shapes += [matvec.Shape(AFFINE[2], 1024, norm_eps=EPS, experts="routed", top=3, router=router)]
    return [
        *(matvec.matvec_kernel(shape, tiling, 2) for shape in shapes),
        *(dequantize.dequantize_kernel(geometry, 2) for geometry in [*AFFINE, *FLOATS]),
        *(rows.embed_kernel(geometry) for geometry in [*AFFINE, *FLOATS, None]),
        rows.join_kernel(3),
        delta_net.steps_kernel(NET, every=True),
        delta_net.steps_kernel(NET, every=True, gated=(64, EPS)),
        delta_net.mix_kernel(NET, 32),
        delta_net.walk_kernel(NET),
        delta_net.norm_kernel(NET),
        decode_attention.split_kernel(HEADS),
        decode_attention.attend_kernel(HEADS, 4),
        decode_attention.join_kernel(HEADS, 4),
        expert_routing.route_kernel(expert_routing.Router(256, 8, True)),
    ]


@pytest.mark.parametrize(
    ("variable", "ask"), [("QCHAT_KERNELS", launch.backend), ("QCHAT_PRODUCTS", fused_matvec.uses_own_matvec)]
)
def test_unknown_words_for_a_choice_are_refused(variable, ask, monkeypatch):
    monkeypatch.setenv(variable, "perhaps")
    with pytest.raises(UsageError, match=f"{variable} is 'perhaps', wanted "):
        ask()


def test_products_are_ours_on_cuda_and_mlxs_on_metal_unless_forced(monkeypatch):
    for device, choice, ours in (
        ("cuda", "auto", True),
        ("metal", "auto", False),
        ("metal", "ours", True),
        ("cuda", "mlx", False),
        (None, "ours", False),
    ):
        monkeypatch.setattr(launch, "_device", lambda device=device: device)
        monkeypatch.setenv("QCHAT_KERNELS", "on")
        monkeypatch.setenv("QCHAT_PRODUCTS", choice)
        assert fused_matvec.uses_own_matvec() == ours


def test_kernels_are_taken_where_their_text_was_proven_unless_forced(monkeypatch):
    for device, choice, taken in (
        ("cuda", "auto", "cuda"),
        ("metal", "auto", None),
        ("metal", "on", "metal"),
        ("cuda", "off", None),
        (None, "on", None),
    ):
        monkeypatch.setattr(launch, "_device", lambda device=device: device)
        monkeypatch.setenv("QCHAT_KERNELS", choice)
        assert launch.backend() == taken


def test_blocks_of_every_published_shape_share_little_enough_memory():
    """A block has 32 KB on Metal; the places are a layer's matrices of the models from 0.8B to 27B."""
    widths = [(1024, 3584), (2048, 6144), (2560, 9216), (4096, 12288), (5120, 17408)]
    places = [(k, n) for width, inner in widths for k, n in ((width, inner), (inner, width), (width, 248320))]
    for geometry, (columns, outputs), n, sides in itertools.product(
        [*AFFINE, *FLOATS, None], places, (1, 2, 4, 8), (1, 2)
    ):
        shape = matvec.Shape(geometry, columns, rows=n, sides=sides, norm_eps=EPS)
        tiling = matvec.choose_tiling(shape, outputs)
        inputs, warps = min(n, matvec.INPUTS_AT_ONCE), tiling.threads // matvec.LANES
        assert 4 * warps * inputs * (tiling.outputs * sides + 1) <= 32 << 10
        assert tiling.outputs > 0


def test_few_rows_without_our_kernel_are_mlxs_operations():
    """Whose bfloat16 products on a CPU are ten times less exact than ours."""
    (gate, of_gate), (up, of_up) = pack(AFFINE[2], 24, 128), pack(None, 24, 128, seed=1)
    x, norm, add = normal(2, 128, seed=2), fused_matvec.Norm(mx.full(128, 1.5), EPS), normal(2, 24, seed=4)
    seen = normed(x, norm)
    near(fused_matvec.product(x, gate, norm=norm, add=add), seen @ of_gate.T + wide(add), 2e-2)
    near(fused_matvec.gate_up(x, gate, up, norm=norm), silu(seen @ of_gate.T) * (seen @ of_up.T), 3e-2)


def test_both_backends_are_given_the_same_body():
    for kernel in every_kernel():
        for backend in ("cuda", "metal"):
            header, text = launch.texts(kernel, backend)
            assert text == launch.OPENINGS[backend] + kernel.body
            assert header.startswith(launch.PRELUDES[backend] + kernel.helpers)


def defined_words(text: str) -> set[str]:
    functions = re.findall(r"inline \w+ (\w+)\(", text)
    return {*functions, *re.findall(r"#define (\w+)", text), *re.findall(r"const uint (.*?);", text)}


def test_both_preludes_define_the_same_words():
    assert defined_words(launch.CUDA_PRELUDE) == defined_words(launch.METAL_PRELUDE)
    openings = [set(re.findall(r"\b(\w+) = ", text)) for text in (launch.CUDA_OPENING, launch.METAL_OPENING)]
    assert openings[0] == openings[1]


def test_bodies_use_no_backends_own_words():
    foreign = re.compile(r"__\w+|threadIdx|blockIdx|simd_|threadgroup|thread_position|\bthread\b|\bdevice\b")
    for kernel in every_kernel():
        assert not foreign.search(kernel.helpers + kernel.body), kernel.name


def test_kernels_of_other_text_have_other_names(monkeypatch):
    """MLX finds compiled kernels by name, on disk as well, so a name must not outlive its text."""
    made = []
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **given: made.append(given["name"]))
    for kernel in every_kernel():
        launch._build.__wrapped__(kernel, "metal")
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("geometry", [*AFFINE, *FLOATS], ids=str)
def test_the_pairs_of_a_slot_are_its_weights(geometry):
    """The expressions, evaluated in Python, against MLX's own decoding."""
    words = np.random.default_rng(0).integers(0, 1 << 32, geometry.bits, dtype=np.uint64)
    if geometry.mode == "mxfp8":
        words &= 0xFEFEFEFE  # no code that is no number
    one = {"affine": mx.ones, "nvfp4": lambda shape: mx.full(shape, 0x38, mx.uint8)}
    make = one.get(geometry.mode, lambda shape: mx.full(shape, 127, mx.uint8))
    scales = make((1, 128 // geometry.group_size))
    biases = mx.zeros_like(scales) if geometry.mode == "affine" else None
    weight = mx.array(np.tile(words.astype(np.uint32), 4)[None])
    packed = Packed(weight, scales, biases, geometry.group_size, geometry.bits, geometry.mode)
    wanted = np.array(packed.dequantize(mx.float32))[0, :32]
    code, names = unpacking(geometry), {"word": [int(word) for word in words], "picked": picked}
    for line in code.setup.splitlines():
        name, text = line.removeprefix("const uint ").rstrip(";").split(" = ", 1)
        names[name] = evaluated(text, names)
    found = np.full(32, np.nan)
    for pair in code.pairs:
        bits = evaluated(pair.text, names)
        halves = np.array([bits & 0xFFFF, bits >> 16], np.uint16).view(np.float16).astype(np.float64)
        found[[pair.low, pair.high]] = halves * 2.0 ** (code.exponent - pair.shift)
    assert np.array_equal(found, wanted)


def evaluated(text: str, names: dict) -> int:
    text = re.sub(r"picked<([\d, ]+)>\(", r"picked((\1), ", text)
    return eval(re.sub(r"(0x[0-9a-f]+)u", r"\1", text), names) & 0xFFFFFFFF


def picked(places: tuple[int, ...], low: int, high: int) -> int:
    both = (low | high << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(both[place] for place in places), "little")


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("what", ["product", "delta net", "attention", "experts", "written out", "rows"])
def test_both_texts_compute_the_same(what, monkeypatch):
    """The preludes differ, and what is made of a body with them must not."""
    monkeypatch.setattr(launch, "_device", lambda: "cuda")
    monkeypatch.setenv("QCHAT_KERNELS", "on")
    results = []
    for backend in ("metal", "cuda"):
        monkeypatch.setattr(launch.Kernel, "__call__", partialmethod(on_cpu.run, backend=backend))
        results.append(SAMPLES[what]())
    for ours, theirs in zip(*results, strict=True):
        assert mx.array_equal(ours, theirs)


def sample_product() -> list[mx.array]:
    (gate, _), (up, _) = pack(AFFINE[3], 8, 256), pack(AFFINE[3], 8, 256, seed=1)
    return [fused_matvec.gate_up(normal(2, 256), gate, up)]


def sample_delta_net() -> list[mx.array]:
    return [*DELTA(**delta_arguments(3)), *DELTA(**delta_arguments(20))]


def sample_attention() -> list[mx.array]:
    main, ones = normal(1, HEADS.width), mx.ones(256)
    q, k, v = decode_attention.split_heads(
        HEADS, main, ones, ones, decode_attention.rope_frequencies(64, 1e7), mx.array([99])
    )
    keys, values = normal(1, 2, 128, 256), normal(1, 2, 128, 256, seed=1)
    return [q, k, v, decode_attention.attend(HEADS, main, q, keys, values, mx.array([99]))]


def sample_experts() -> list[mx.array]:
    ids, shares, shared = expert_routing.route(normal(2, 9).astype(mx.float32), 3, renormalise=True)
    weight, _ = pack(FLOATS[2], 8, 32, 64)
    return [ids, shared, fused_matvec.experts_sum(normal(6, 64), weight, ids, shares, 3, add=normal(2, 32))]


def sample_written_out() -> list[mx.array]:
    weight, _ = pack(AFFINE[4], 8, 256)
    assert isinstance(weight, Packed)
    return [dequantize.dequantize(weight)]


def sample_rows() -> list[mx.array]:
    table, _ = pack(AFFINE[2], 5, 256)
    return [rows.join([rows.embed(mx.array([4], mx.uint32), table), normal(1, 40)])]


SAMPLES = {
    "product": sample_product,
    "delta net": sample_delta_net,
    "attention": sample_attention,
    "experts": sample_experts,
    "written out": sample_written_out,
    "rows": sample_rows,
}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    drawn = scale * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return mx.array(drawn).astype(mx.bfloat16)


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


def pack(geometry: Geometry | None, *shape: int, seed: int = 0) -> tuple[fused_matvec.Weight, np.ndarray]:
    """A random weight, and the matrix that it stands for."""
    weight = normal(*shape, seed=seed, scale=shape[-1] ** -0.5)
    if geometry is None:
        return weight, wide(weight)
    parts = mx.quantize(weight, geometry.group_size, geometry.bits, mode=geometry.mode)
    biases = parts[2] if geometry.mode == "affine" else None
    packed = Packed(parts[0], parts[1], biases, geometry.group_size, geometry.bits, geometry.mode)
    return packed, wide(packed.dequantize(mx.float32))


def normed(x: mx.array, norm: fused_matvec.Norm) -> np.ndarray:
    seen = wide(x)
    return seen / np.sqrt((seen**2).mean(axis=-1, keepdims=True) + norm.eps) * wide(norm.weight)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def near(found: mx.array, wanted: np.ndarray, limit: float = LIMIT) -> None:
    assert found.shape == wanted.shape
    assert relative_rms(found.astype(mx.float32), wanted) <= limit


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("geometry", "count"),
    [
        *zip([*AFFINE, *GROUPS, *FLOATS, None], [1, 3, 2, 1, 3, 1, 1, 1, 3, 1, 1, 2], strict=True),
        (AFFINE[2], 7),
    ],
    ids=str,
)
def test_products_of_few_rows_take_norm_and_residual_along(geometry, count):
    """40 outputs are more than a block's; 1,088 columns leave lanes without work."""
    weight, dense = pack(geometry, 40, 1024 + 128)
    x, add = normal(count, 1152, seed=1), normal(count, 40, seed=2)
    norm = fused_matvec.Norm(1 + 0.3 * normal(1152, seed=3).astype(mx.float32), EPS)
    near(fused_matvec.product(x, weight, norm=norm, add=add), normed(x, norm) @ dense.T + wide(add))


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("geometry", [AFFINE[1], FLOATS[2], None], ids=str)
def test_gate_and_up_are_one_product(geometry):
    (gate, of_gate), (up, of_up) = pack(geometry, 24, 256), pack(geometry, 24, 256, seed=1)
    x, norm = normal(2, 256, seed=2), fused_matvec.Norm(1 + 0.3 * normal(256, seed=3).astype(mx.float32), EPS)
    seen = normed(x, norm)
    near(fused_matvec.gate_up(x, gate, up, norm=norm), silu(seen @ of_gate.T) * (seen @ of_up.T))


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("geometry", "count"), [(AFFINE[0], 1), (AFFINE[4], 2), (None, 1)], ids=str)
def test_long_rows_take_several_steps(geometry, count, monkeypatch):
    """Each adds to what the one before left in shared memory."""
    monkeypatch.setattr(matvec, "ONE_ROW_THREADS", 32)
    monkeypatch.setattr(matvec, "MORE_ROWS_THREADS", 32)
    weight, dense = pack(geometry, 12, 3 * 1024 + 64)
    x, norm = normal(count, 3 * 1024 + 64, seed=1), fused_matvec.Norm(mx.full(3 * 1024 + 64, 1.5), EPS)
    near(fused_matvec.product(x, weight, norm=norm), normed(x, norm) @ dense.T)


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
def test_inputs_of_any_size_neither_overflow_nor_vanish():
    """Products are halves, whose range is 2^-24 to 2^16; an input's may be bfloat16's, 2^-126 to 2^127."""
    weight, dense = pack(AFFINE[5], 16, 256)
    for scale in (1e-30, 1e-4, 1e4, 1e30):
        x = normal(1, 256, seed=1, scale=scale)
        near(fused_matvec.product(x, weight), wide(x) @ dense.T)
    outlier = mx.concatenate([normal(1, 255, seed=1), mx.full((1, 1), 3e4, mx.bfloat16)], axis=1)
    near(fused_matvec.product(outlier, weight), wide(outlier) @ dense.T)


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("geometry", [AFFINE[2], FLOATS[1]], ids=str)
def test_experts_are_those_that_ids_name(geometry):
    top, count, norm = 2, 5, fused_matvec.Norm(1 + 0.3 * normal(128, seed=9).astype(mx.float32), EPS)
    (gate, of_gate), (up, of_up) = (pack(geometry, count, 64, 128, seed=s) for s in (1, 2))
    down, of_down = pack(geometry, count, 128, 64, seed=3)
    assert isinstance(down, Packed)
    x, chosen = normal(3, 128, seed=4), [4, 0, 2, 2, 1, 4]
    ids, shares = mx.array(chosen, mx.uint32), mx.array([0.3, 0.7, 0.5, 0.5, 0.9, 0.1])
    hidden = fused_matvec.experts_gate_up(x, gate, up, ids, top, norm=norm)
    rows_of = np.repeat(normed(x, norm), top, axis=0)
    pairs = list(zip(chosen, rows_of, strict=True))
    near(hidden, np.stack([silu(of_gate[e] @ row) * (of_up[e] @ row) for e, row in pairs]))
    parts = [s * (of_down[e] @ h) for s, e, h in zip(wide(shares), chosen, wide(hidden), strict=True)]
    wanted = wide(x) + np.stack(parts).reshape(3, top, 128).sum(axis=1)
    near(fused_matvec.experts_sum(hidden, down, ids, shares, top, add=x), wanted)
    alone = wide(x) + wide(shares)[:3, None] * (wide(hidden)[:3] @ of_down[0].T)
    first = replace(down, **{n: a[0] for n, a in vars(down).items() if isinstance(a, mx.array)})
    near(fused_matvec.shared_sum(hidden[:3], first, shares[:3], add=x), alone)


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("geometry", [AFFINE[2], None], ids=str)
@pytest.mark.parametrize("renormalise", [True, False])
def test_a_product_that_routes_equals_routing_first_and_takes_the_shared_expert_along(geometry, renormalise):
    """40 routed experts are more than a warp has lanes, and 64 outputs more than a block's."""
    count, top, norm = 40, 3, fused_matvec.Norm(1 + 0.3 * normal(128, seed=9).astype(mx.float32), EPS)
    (gate, of_gate), (up, of_up) = (pack(geometry, count + 1, 64, 128, seed=s) for s in (1, 2))
    x, logits = normal(3, 128, seed=4), normal(3, count + 1, seed=5).astype(mx.float32)
    router = expert_routing.Router(count, top, renormalise)
    hidden, ids, shares = fused_matvec.routed_gate_up(x, gate, up, logits, router, norm=norm)
    first, of_first, shared = expert_routing.route(logits, top, renormalise=renormalise)
    assert ids.reshape(3, top + 1)[:, :top].tolist() == first.reshape(3, top).tolist()
    assert ids.reshape(3, top + 1)[:, top].tolist() == [count] * 3
    assert mx.array_equal(shares.reshape(3, top + 1)[:, :top].flatten(), of_first)
    assert mx.array_equal(shares.reshape(3, top + 1)[:, top], shared)
    rows = zip(np.array(ids), np.repeat(normed(x, norm), top + 1, axis=0), strict=True)
    near(hidden, np.stack([silu(of_gate[e] @ row) * (of_up[e] @ row) for e, row in rows]))


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("renormalise", [True, False])
def test_routing_takes_the_best_experts_and_among_equals_the_first(renormalise):
    logits = normal(3, 71, seed=1).astype(mx.float32)
    logits[1, 40] = logits[1, 3] = logits[1].max() + 1
    ids, shares, shared = expert_routing.route(logits, 4, renormalise=renormalise)
    order = np.argsort(-wide(logits)[:, :70], axis=-1, kind="stable")[:, :4]
    assert np.array_equal(np.array(ids).reshape(3, 4), order)
    weights = np.exp(wide(logits)[:, :70])
    chosen = np.take_along_axis(weights, order, axis=-1)
    total = chosen if renormalise else weights
    near(shares.reshape(3, 4), chosen / total.sum(axis=-1, keepdims=True), 1e-6)
    near(shared, 1 / (1 + np.exp(-wide(logits)[:, 70])), 1e-6)


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("geometry", [*AFFINE, *FLOATS], ids=str)
def test_a_weight_written_out_is_the_dequantized_one(geometry):
    weight, dense = pack(geometry, 3, 10, 256)
    assert isinstance(weight, Packed)
    near(dequantize.dequantize(weight), dense, 2e-3)


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("geometry", [*AFFINE, *FLOATS, None], ids=str)
def test_ids_choose_rows_of_an_embedding(geometry):
    weight, dense = pack(geometry, 10, 5248)
    near(rows.embed(mx.array([7, 0, 7], mx.uint32), weight), dense[[7, 0, 7]], 2e-3)


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
def test_parts_of_rows_are_put_side_by_side():
    parts = [normal(3, width, seed=width) for width in (200, 1, 64)]
    assert mx.array_equal(rows.join(parts), mx.concatenate(parts, axis=-1))


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu_as_cuda")
def test_addresses_come_with_a_number():
    memory = np.zeros(80, np.float32)
    places = [memory.ctypes.data + 4 * n for n in range(40)]
    kernel = recording.address_kernel(64)
    words = np.zeros(129, np.uint32)
    number = np.array([7], np.uint32)
    pointers = [number.ctypes.data, *places, *[places[-1]] * 24, words.ctypes.data]
    arrays = [mx.array(number), *[mx.zeros(1)] * 64]
    on_cpu.run_at(kernel, arrays, [mx.zeros(129, mx.uint32)], pointers, (1, 1, 1))
    assert words[0] == 7
    found = [int(low) | int(high) << 32 for low, high in words[1:].reshape(64, 2)]
    assert found == pointers[1:65]


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu_as_cuda")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_results_are_copied_after_their_step(dtype):
    array = normal(1, 600).astype(dtype)
    done = mx.array([5], mx.uint32)
    assert mx.array_equal(recording.copy_after(done, 5, [array])[0], array)


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu_as_cuda")
@pytest.mark.parametrize("geometry", [*AFFINE, *FLOATS, *GROUPS], ids=str)
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(9, 40, 256), (70, 17, 1280)])
def test_tensor_cores_multiply_rows_with_a_packed_weight(geometry, rows, outputs, columns):
    weight, dense = pack(geometry, outputs, columns)
    assert isinstance(weight, Packed)
    x = normal(rows, columns, seed=1)
    near(tensor_product.tensor_product(x, weight), wide(x) @ dense.T, LIMIT)


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu_as_cuda")
@pytest.mark.parametrize("geometry", [AFFINE[1], AFFINE[2], *FLOATS], ids=str)
def test_tensor_cores_multiply_sorted_rows_with_their_experts(geometry):
    weight, dense = pack(geometry, 5, 40, 384)
    assert isinstance(weight, Packed)
    index = np.repeat([0, 1, 3, 4], [84, 25, 37, 64])
    x = normal(len(index), 384, seed=1)
    groups = tensor_product.group_rows(mx.array(index.astype(np.uint32)), 5)
    wanted = [[0, 0, 64], [0, 64, 20], [1, 84, 25], [3, 109, 37], [4, 146, 64]]
    assert np.array(groups)[:5].tolist() == wanted
    assert not np.array(groups)[5:, 2].any()
    products = np.einsum("sk,snk->sn", wide(x), dense[index])
    near(tensor_product.experts_product(x, weight, groups), products, LIMIT)


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu_as_cuda")
def test_a_prompt_takes_tensor_cores_until_dequantizing_pays(monkeypatch):
    weight, dense = pack(AFFINE[2], 24, 256)
    most, taken = tensor_product.MAX_TENSOR_ROWS, []

    def multiply(x: mx.array, weight: Packed) -> mx.array:
        taken.append(len(x))
        return tensor_product.tensor_product(x, weight)

    monkeypatch.setattr(linear, "tensor_product", multiply)
    for count in (1, most, most + 1):
        x = normal(1, count, 256)
        near(make_linear(weight)(x).reshape(count, -1), wide(x)[0] @ dense.T, LIMIT)
    assert taken == [most]


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu_as_cuda")
@pytest.mark.parametrize("columns", [256, 192])
def test_rows_with_experts_are_multiplied_in_every_form(columns, monkeypatch):
    weight, dense = pack(AFFINE[2], 3, 24, columns)
    index = np.repeat([0, 2], [30, 40])
    x = normal(len(index), columns)[:, None]
    plain, distances = mx.gather_mm, []

    def gather(x: mx.array, weight: mx.array, **options) -> mx.array:
        view: Any = memoryview(x)  # pyright: ignore[reportArgumentType]
        distances.append(view.strides[-2] // x.dtype.size)
        return plain(x.astype(mx.float32), weight.astype(mx.float32), **options)

    monkeypatch.setattr(mx, "gather_mm", gather)
    found = ExpertsLinear(weight)(x, mx.array(index.astype(np.uint32)), True)
    near(found[:, 0], np.einsum("sk,snk->sn", wide(x)[:, 0], dense[index]), LIMIT)
    assert distances == ([] if columns == 256 else [columns])


def delta_arguments(length: int) -> dict[str, mx.array]:
    return {
        "main": normal(length, NET.main_width),
        "ab": normal(length, NET.ab_width, seed=1),
        "conv": normal(1, 3, NET.channels, seed=2),
        "state": normal(1, 6, 32, 32, seed=3).astype(mx.float32),
    }


DELTA = delta_net.DeltaKernels(
    NET,
    normal(4, NET.channels, seed=4, scale=0.4),
    normal(6, seed=5).astype(mx.float32),
    normal(6, seed=6).astype(mx.float32),
    1 + 0.2 * normal(32, seed=7).astype(mx.float32),
)


def delta_net_in_parts(main: mx.array, ab: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, ...]:
    """What the kernels fuse, by the reference and in float32."""
    length, key_heads, dim = len(main), NET.key_heads, NET.key_dim
    main, ab, conv, taps = (x.astype(mx.float32) for x in (main, ab, conv, DELTA.taps))
    window = mx.concatenate([conv, main[None, :, : NET.channels]], axis=1)
    qk, v = mx.split(convolve(window, taps), [2 * key_heads * dim], axis=-1)
    qk = l2_normalise(qk.reshape(1, length, 2, key_heads, dim))
    g, beta = decay_and_beta(ab[None, :, :6], ab[None, :, 6:], DELTA.log_a, DELTA.dt_bias)
    v = v.reshape(1, length, 6, dim)
    output, state = gated_delta_rule(qk[:, :, 0] * dim**-0.5, qk[:, :, 1], v, g, beta, state)
    gate = main[None, :, NET.z_at :].reshape(v.shape)
    return gated_norm(output, DELTA.norm, gate, EPS).reshape(length, -1), window[:, length:], state


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("length", [1, 2, 8, 9, 37])
def test_the_fused_delta_net_equals_its_parts(length):
    arguments = delta_arguments(length)
    found, wanted = DELTA(**arguments), delta_net_in_parts(**arguments)
    near(found[0], wide(wanted[0]))
    assert mx.array_equal(found[1].astype(mx.float32), wanted[1])
    near(found[2], wide(wanted[2]), 2e-6)


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("length", [1, 3, 8])
def test_the_delta_net_makes_decay_and_beta_from_the_layers_input(length):
    """1,100 columns are no multiple of a block's threads."""
    arguments, x = delta_arguments(length), normal(length, 1100, seed=8)
    norm = fused_matvec.Norm(1 + 0.3 * normal(1100, seed=9).astype(mx.float32), EPS)
    rows, of_rows = pack(None, NET.ab_width, 1100, seed=10)
    assert isinstance(rows, mx.array)
    gates = delta_net.Gates(rows, norm.weight, norm.eps)
    main, conv, state = (arguments[name] for name in ("main", "conv", "state"))
    ab = mx.array(normed(x, norm) @ of_rows.T, mx.float32)
    wanted = delta_net_in_parts(main, ab, conv, state)
    y, new_conv, new_state = DELTA.steps_of(main, x, gates, conv, state)
    near(y, wide(wanted[0]))
    assert mx.array_equal(new_conv.astype(mx.float32), wanted[1])
    near(new_state, wide(wanted[2]), 2e-6)
    _, convs, states = DELTA.steps_of(main, x, gates, conv, state, every=True)
    assert mx.array_equal(convs[-1], new_conv[0])
    assert mx.array_equal(states[-1], new_state[0])


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
def test_the_states_after_every_step_are_those_of_shorter_runs():
    arguments = delta_arguments(5)
    _, convs, states = DELTA.steps(**arguments, every=True)
    for t in range(5):
        cut = arguments | {name: arguments[name][: t + 1] for name in ("main", "ab")}
        _, conv, state = delta_net_in_parts(**cut)
        assert mx.array_equal(convs[t].astype(mx.float32), conv[0])
        near(states[t], wide(state[0]), 2e-6)


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("length", "capacity"), [(2, 256), (130, 256), (700, 1024)])
def test_attention_in_splits_equals_softmax_in_float64(length, capacity):
    steps, q_norm, k_norm = 2, *(1 + 0.2 * normal(256, seed=s).astype(mx.float32) for s in (1, 2))
    main, offset = normal(steps, HEADS.width), mx.array([length - steps], mx.int32)
    q, k, v = decode_attention.split_heads(
        HEADS, main, q_norm, k_norm, decode_attention.rope_frequencies(64, 1e7), offset
    )
    queries = main[:, : 6 * 512].reshape(steps, 6, 2, 256)
    keys = main[:, 6 * 512 :].reshape(steps, 4, 256)
    near(q, wide(rotated(queries[:, :, 0], q_norm, length - steps)))
    near(k, wide(rotated(keys[:, :2], k_norm, length - steps)))
    assert mx.array_equal(v[0], keys[:, 2:].swapaxes(0, 1))
    cached, valued = (normal(1, 2, capacity, 256, seed=s) for s in (3, 4))
    found = decode_attention.attend(HEADS, main, q, cached, valued, offset)
    wanted = np.zeros((steps, 6, 256))
    for t, head in np.ndindex(steps, 6):
        seen = slice(0, length - steps + t + 1)
        scores = wide(cached)[0, head // 3, seen] @ wide(q)[0, head, t] / 16
        weights = np.exp(scores - scores.max())
        wanted[t, head] = weights / weights.sum() @ wide(valued)[0, head // 3, seen]
    gate = 1 / (1 + np.exp(-wide(queries[:, :, 1])))
    near(found, (wanted * gate).reshape(steps, -1))


@needs_a_compiler
@pytest.mark.usefixtures("on_the_cpu")
def test_queries_and_keys_are_rotated_by_yarn():
    """The factor on cosines and sines is in the norms, so the kernel needs the frequencies alone."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    rotary = Rotary(ModelConfig.parse(tiny_config(flat=True, head_dim=256, rope_parameters=yarn)))
    q_norm, k_norm = (1 + 0.2 * normal(256, seed=s).astype(mx.float32) for s in (1, 2))
    main, offset = normal(2, HEADS.width), mx.array([5000], mx.int32)
    norms = rotary.scale_norm(q_norm), rotary.scale_norm(k_norm)
    q, k, _ = decode_attention.split_heads(HEADS, main, *norms, rotary.frequencies, offset)
    queries = main[:, : 6 * 512].reshape(2, 6, 2, 256)[:, :, 0]
    keys = main[:, 6 * 512 :].reshape(2, 4, 256)[:, :2]
    for found, heads, norm in ((q, queries, norms[0]), (k, keys, norms[1])):
        plain = mx.fast.rms_norm(heads.astype(mx.float32).swapaxes(0, 1)[None], norm, EPS)
        near(found, wide(rotary(plain, offset)))
    assert float(norms[0][0] / q_norm[0]) == pytest.approx(0.1 * math.log(4) + 1)


def rotated(x: mx.array, norm: mx.array, offset: int) -> mx.array:
    """MLX's norm and rotary of [T, H, D]: [1, H, T, D]."""
    x = mx.fast.rms_norm(x.astype(mx.float32).swapaxes(0, 1)[None], norm, EPS)
    return mx.fast.rope(x, 64, traditional=False, base=1e7, scale=1.0, offset=offset)
