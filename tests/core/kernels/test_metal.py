"""Metal's texts against what is known of Metal and of Apple's GPUs."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.packed import Geometry
from qchat.core.kernels import decode_attention, delta_net, dequantize, expert_routing, matvec
from qchat.core.kernels.launch import Kernel, texts
from qchat.core.machine.backend import mx
from tests.core.kernels import metal_checks
from tests.core.kernels.on_cpu import needs_a_compiler
from tests.core.kernels.test_kernels import AFFINE, FLOATS, GROUPS
from tests.paths import QWEN

CONFIGS = sorted((QWEN / "configs").glob("*.config.json"))
EPS = 1e-6
BF, F32, U32, I32 = mx.bfloat16, mx.float32, mx.uint32, mx.int32

Typed = tuple[Kernel, Sequence[mx.Dtype], Sequence[mx.Dtype]]


def packed_types(geometry: Geometry | None) -> list[mx.Dtype]:
    if geometry is None:
        return [BF]
    return [U32, BF, BF] if geometry.mode == "affine" else [U32, mx.uint8]


def products(columns: int, outputs: int) -> Iterator[Typed]:
    """A product of every format, fused with all there is, for one, two and eight rows."""
    for geometry in [*AFFINE, *GROUPS, *FLOATS, None]:
        for rows in (1, 2, 8):
            shape = matvec.Shape(geometry, columns, rows=rows, sides=2, norm_eps=EPS, adds=True)
            kernel = matvec.matvec_kernel(shape, matvec.choose_tiling(shape, outputs), 2)
            yield kernel, [BF, *packed_types(geometry) * 2, F32, BF], [BF]
        if geometry is not None:
            yield dequantize.dequantize_kernel(geometry, 2), packed_types(geometry), [BF]


def experts(top: int) -> Iterator[Typed]:
    for kind, extras in (("each", [U32]), ("summed", [BF, U32, F32]), ("shared", [BF, F32])):
        adds, sides = kind != "each", 2 if kind == "each" else 1
        shape = matvec.Shape(AFFINE[2], 1024, sides=sides, adds=adds, experts=kind, top=top)  # type: ignore[arg-type]
        kernel = matvec.matvec_kernel(shape, matvec.choose_tiling(shape, 512), 3)
        yield kernel, [BF, *packed_types(AFFINE[2]) * sides, *extras], [BF]


def kernels_of(config: ModelConfig) -> Iterator[Typed]:
    """The kernels of one model's delta nets, attentions and routers."""
    channels, values = config.conv_dim, config.value_dim
    net = delta_net.Net(
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        taps=config.linear_conv_kernel_dim,
        norm_eps=EPS,
        main_width=channels + values,
        z_at=channels,
        ab_width=2 * config.linear_num_value_heads,
        a_at=0,
    )
    assert delta_net.fits(net)
    for every in (False, True):
        yield delta_net.steps_kernel(net, every), [BF, BF, BF, F32, BF, F32, F32, F32], [BF, BF, F32]
        gated = delta_net.steps_kernel(net, every, (config.hidden_size, EPS))
        yield gated, [BF, BF, BF, F32, BF, F32, BF, F32, F32, F32], [BF, BF, F32]
    widest = max(net.key_dim, net.value_dim)
    yield delta_net.mix_kernel(net, widest), [BF, BF, BF, BF, F32, F32], [F32] * 5
    yield delta_net.walk_kernel(net), [BF, F32, F32, F32, F32, F32, F32], [F32, F32]
    yield delta_net.norm_kernel(net), [BF, F32, F32], [BF]
    heads = decode_attention.Heads(
        config.num_attention_heads, config.num_key_value_heads, config.rotary_dim, EPS
    )
    if decode_attention.fits(heads, config.head_dim):
        yield decode_attention.split_kernel(heads), [BF, F32, F32, F32, I32], [BF] * 3
        yield (
            decode_attention.attend_kernel(heads, decode_attention.MAX_SPLITS),
            [BF, BF, BF, I32],
            [F32, F32],
        )
        yield decode_attention.join_kernel(heads, decode_attention.MAX_SPLITS), [BF, F32, F32], [BF]
    if config.is_moe:
        top = config.num_experts_per_tok
        router = expert_routing.Router(config.num_experts, top, True)
        yield expert_routing.route_kernel(router), [F32], [U32, F32, F32]
        yield from experts(top)
        inner, columns = config.moe_intermediate_size, config.hidden_size
        for geometry in [*AFFINE, *FLOATS]:
            shape = matvec.Shape(
                geometry, columns, sides=2, norm_eps=EPS, experts="routed", top=top + 1, router=router
            )
            kernel = matvec.matvec_kernel(shape, matvec.choose_tiling(shape, inner, top + 1), 3)
            yield kernel, [BF, *packed_types(geometry) * 2, F32, F32], [BF, U32, F32]


def published() -> list[Typed]:
    """Every text that ships, for every published model; equal kernels once."""
    found = [*products(5120, 17408), *products(17408, 5120)]
    for path in CONFIGS:
        found += kernels_of(ModelConfig.parse(json.loads(path.read_text()), path.name))
    return list({(kernel.name, texts(kernel, "metal")): (kernel, i, o) for kernel, i, o in found}.values())


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.skipif(not CONFIGS, reason="the published configs are not here")
def test_every_text_compiles_without_warnings_and_fits_an_apple_gpu(tmp_path: Path):
    kernels = published()
    sizes = metal_checks.threadgroup_nbytes(kernels, tmp_path)
    for (kernel, _, _), nbytes in zip(kernels, sizes, strict=True):
        assert nbytes <= metal_checks.MEMORY_NBYTES, (kernel.name, nbytes)
        assert kernel.threads <= metal_checks.THREADS and kernel.threads % 32 == 0, kernel.name
        assert not metal_checks.foreign_words(kernel), kernel.name
    largest: dict[str, int] = {}
    for (kernel, _, _), nbytes in zip(kernels, sizes, strict=True):
        largest[kernel.name] = max(largest.get(kernel.name, 0), nbytes)
    print(*(f"{name}: {nbytes}" for name, nbytes in sorted(largest.items())), sep="\n")
    assert {"delta_steps", "delta_walk", "attend", "route"} <= largest.keys()
    assert largest["attend"] > 3 * 4 * 256 * 4  # what three quarters of a block leave for the fourth


@needs_a_compiler
@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("y[tid] = float(x[tid]) * 0.1 + double(1);", "double"),
        ("bf16 b = x[tid]; y[tid] = float(b);", "conversion"),
        ("half h = x[tid]; y[tid] = float(h) + float(k[0]);", "conversion"),
        ("SHARED float room[5][1024]; room[0][tid] = 1; y[tid] = room[0][0]; int unsignedness = tid; "
         "if (unsignedness < lane) y[0] = 1;", "sign"),
    ],
)  # fmt: skip
def test_the_checks_find_what_is_planted(body: str, wrong: str, tmp_path: Path, capfd):
    kernel = Kernel("planted", ("x", "k"), ("y",), body, 32)
    try:
        metal_checks.threadgroup_nbytes([(kernel, [F32, BF], [F32])], tmp_path)
        warned = False
    except subprocess.CalledProcessError:
        warned = True
    said = capfd.readouterr().err
    assert warned and wrong in said


@needs_a_compiler
def test_shared_memory_is_counted(tmp_path: Path):
    body = "SHARED float a[100]; SHARED uint4 b[3]; a[tid] = 1; b[0].x = 2; y[tid] = a[0] + float(b[0].x);"
    kernel = Kernel("counted", (), ("y",), body, 32)
    (nbytes,) = metal_checks.threadgroup_nbytes([(kernel, [], [F32])], tmp_path)
    assert 448 <= nbytes <= 512


def test_words_that_metal_lacks_are_found():
    body = "double a; // atomic_ulong in a comment\n atomic_fetch_add(x); long b; uint fine;"
    assert metal_checks.foreign_words(Kernel("w", (), (), body, 32)) == {"double", "atomic_fetch_add", "long"}
