"""Every stored layout gives the tensors of its raw source; whatever does not fit is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.layouts import body_specs
from qchat.core.checkpoint.packed import AFFINE_BITS, AFFINE_GROUPS, FLOAT_MODES, solve_geometry
from qchat.core.checkpoint.shards import INDEX_NAME
from qchat.core.checkpoint.weights import Packed, Weights, load_weights
from qchat.core.errors import WeightsError
from qchat.core.machine.backend import mx
from tests.checkpoints import (
    Tensors,
    Triple,
    convert_tensors,
    fp8_checkpoint,
    load_tensors,
    quantize_checkpoint,
    save_shards,
    tiny_config,
    write_checkpoint,
)
from tests.compare import needs_qtiny, relative_rms
from tests.paths import QTINY, QWEN

PUBLISHED = QWEN / "configs"
NORM_ENDS = ("layernorm", "q_norm", "k_norm")
AFFINE: list[Triple] = [(bits, 64, "affine") for bits in AFFINE_BITS]
AFFINE += [(4, 32, "affine"), (4, 128, "affine")]
FLOAT: list[Triple] = [(bits, group, mode) for (bits, group), mode in FLOAT_MODES.items()]
PREFIXES = ("language_model.model.", "model.language_model.", "model.", "")


def load(folder: Path) -> Weights:
    return load_weights(folder, ModelConfig.load(folder))


def canonical(raw: Tensors) -> Tensors:
    """The raw tensors under canonical names, by a path of its own: norms shifted in float32."""
    tensors: Tensors = {}
    for stored, tensor in convert_tensors(raw, prefix="").items():
        name = stored.removesuffix(".weight")
        if name.endswith("conv1d"):
            tensor = tensor.squeeze(-1)
        tensors[name] = tensor
    for stored, tensor in raw.items():
        name = stored.removeprefix("model.").removeprefix("language_model.").removesuffix(".weight")
        if name in tensors and is_shifted(name):
            tensors[name] = tensor.astype(mx.float32) + 1
        elif name in tensors and ("norm" in name or name.endswith(("A_log", "dt_bias"))):
            tensors[name] = tensor.astype(mx.float32)
    return tensors


def is_shifted(name: str) -> bool:
    return name.endswith(NORM_ENDS) or name == "norm" or (name.startswith("mtp.") and "norm" in name)


def assert_same(found: mx.array, wanted: mx.array, name: str, tolerance: float = 0.0) -> None:
    assert found.shape == wanted.shape, name
    assert found.dtype == wanted.dtype, name
    difference = mx.abs(found.astype(mx.float32) - wanted.astype(mx.float32)).max()
    assert difference <= tolerance, (name, difference)


def assert_equal_to_raw(weights: Weights, raw: Tensors) -> None:
    wanted = canonical(raw)
    assert set(weights.tensors) == set(wanted)
    for name, tensor in weights.tensors.items():
        assert isinstance(tensor, mx.array), name
        assert_same(tensor, wanted[name], name)


def assert_equal_to_packed(weights: Weights, raw: Tensors) -> None:
    """Packed tensors hold what quantizing the raw ones in memory gives; norms were rounded to bfloat16."""
    wanted = canonical(raw)
    assert set(weights.tensors) == set(wanted)
    assert weights.parameters == sum(tensor.size for tensor in wanted.values())
    for name, tensor in weights.tensors.items():
        if isinstance(tensor, Packed):
            parts = mx.quantize(wanted[name], tensor.group_size, tensor.bits, tensor.mode)
            for part, other in zip(tensor.arrays, parts, strict=True):
                assert mx.array_equal(part, other).item(), name
        else:
            assert_same(tensor, wanted[name], name, 2**-8 if is_shifted(name) else 0.0)


def rewrite(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """The folder with these tensors in one file, and top-level config fields replaced."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_shards(folder, tensors)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | config))
    return folder


@pytest.mark.parametrize("experts", ["stacked", "each"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "shape", [{"flat": True}, {"tied": False}, {"moe": True}, {"mtp": False, "hv_ratio": 1}]
)
def test_a_raw_folder_gives_its_tensors_with_the_norms_shifted(tmp_path, experts, shards, shape):
    write_checkpoint(tmp_path, experts=experts, shards=shards, **shape)
    weights = load(tmp_path)
    raw = load_tensors(tmp_path)
    if experts == "stacked":
        assert_equal_to_raw(weights, raw)
    else:
        stacked = tmp_path / "stacked"
        write_checkpoint(stacked, **shape)
        assert_equal_to_raw(weights, load_tensors(stacked))
    assert weights.has_mtp == shape.get("mtp", True)
    assert any("1 was added" in repair for repair in weights.repairs)


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("triple", AFFINE + FLOAT, ids=str)
def test_a_converted_folder_gives_what_quantizing_in_memory_gives(tmp_path, moe, triple):
    raw, converted = tmp_path / "raw", tmp_path / "converted"
    write_checkpoint(raw, moe=moe, tied=False, hidden_size=128)
    quantize_checkpoint(raw, converted, triple, shards=2)
    weights = load(converted)
    assert_equal_to_packed(weights, load_tensors(raw))
    assert weights.repairs == ()
    packed = {tensor.geometry for tensor in weights.tensors.values() if isinstance(tensor, Packed)}
    assert {(found.bits, found.group_size, found.mode) for found in packed} == {triple}
    assert isinstance(weights.tensors["embed_tokens"], Packed)
    assert isinstance(weights.tensors["lm_head"], Packed)


def test_every_tensor_may_be_packed_in_its_own_way(tmp_path):
    triples: list[Triple | None] = [*AFFINE[:-1], *FLOAT, None]
    seen: list[str] = []

    def choose(path: str) -> Triple | None:
        seen.append(path)
        return triples[len(seen) % len(triples)]

    write_checkpoint(tmp_path / "raw", moe=True, tied=False)
    quantize_checkpoint(tmp_path / "raw", tmp_path / "mixed", choose)
    weights = load(tmp_path / "mixed")
    assert_equal_to_packed(weights, load_tensors(tmp_path / "raw"))
    assert weights.repairs == ()
    kinds = {tensor.geometry for tensor in weights.tensors.values() if isinstance(tensor, Packed)}
    assert len(kinds) == len(triples) - 1


@pytest.mark.parametrize("prefix", PREFIXES)
def test_converted_names_may_carry_any_known_prefix(tmp_path, prefix):
    write_checkpoint(tmp_path / "raw", tied=False)
    quantize_checkpoint(tmp_path / "raw", tmp_path / "converted", (4, 64, "affine"), prefix=prefix)
    weights = load(tmp_path / "converted")
    assert_equal_to_packed(weights, load_tensors(tmp_path / "raw"))
    assert weights.repairs == ()


@pytest.mark.parametrize("triple", [(4, 64, "affine"), (4, 32, "mxfp4")], ids=str)
def test_converted_experts_stored_one_by_one_are_stacked(tmp_path, triple):
    write_checkpoint(tmp_path / "raw", moe=True)
    quantize_checkpoint(tmp_path / "raw", tmp_path / "converted", triple)
    each: Tensors = {}
    for name, tensor in load_tensors(tmp_path / "converted").items():
        if "switch_mlp" in name:
            each |= {name.replace("switch_mlp", f"experts.{e}"): one for e, one in enumerate(tensor)}
        else:
            each[name] = tensor
    weights = load(rewrite(tmp_path / "converted", each))
    assert_equal_to_packed(weights, load_tensors(tmp_path / "raw"))
    assert any("one by one" in repair for repair in weights.repairs)


@pytest.mark.parametrize("experts", ["stacked", "each"])
@pytest.mark.parametrize("moe", [False, True])
def test_fp8_weights_are_expanded_with_their_block_scales(tmp_path, moe, experts):
    write_checkpoint(tmp_path / "raw", moe=moe, experts=experts)
    fp8_checkpoint(tmp_path / "raw", tmp_path / "fp8")
    weights, source = load(tmp_path / "fp8"), load(tmp_path / "raw")
    for name, tensor in weights.tensors.items():
        wanted = source.tensors[name]
        assert isinstance(tensor, mx.array)
        assert isinstance(wanted, mx.array)
        assert tensor.dtype == wanted.dtype, name
        # E4M3 has 3 bits of mantissa: at most 1/16 off per weight, about 0.026 on average
        assert relative_rms(tensor.astype(mx.float32), wanted.astype(mx.float32)) < 0.04, name
    assert any("FP8" in repair for repair in weights.repairs)


def test_a_ragged_fp8_block_takes_the_scale_of_its_own_corner(tmp_path):
    write_checkpoint(tmp_path / "raw", mtp=False)
    fp8_checkpoint(tmp_path / "raw", tmp_path / "fp8")
    stored = load_tensors(tmp_path / "fp8")
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    scales = stored[f"{name}_scale_inv"]
    assert scales.shape == (2, 1)  # 192 rows
    stored[f"{name}_scale_inv"] = mx.array([[1.0], [4.0]])
    found = load(rewrite(tmp_path / "fp8", stored)).tensors["layers.0.mlp.gate_proj"]
    codes = mx.from_fp8(stored[name], mx.float32)
    wanted = mx.concatenate([codes[:128], 4 * codes[128:]])
    assert isinstance(found, mx.array)
    assert_same(found, wanted.astype(mx.bfloat16), name)


@pytest.mark.parametrize("bare", [False, True], ids=["mtp.", "bare"])
@pytest.mark.parametrize("file", ["mtp.safetensors", "mtp/weights.safetensors"])
def test_an_mtp_head_is_found_in_a_file_of_its_own(tmp_path, file, bare):
    write_checkpoint(tmp_path)
    raw = load_tensors(tmp_path)
    head = {name.removeprefix("mtp.") if bare else name: raw[name] for name in raw if name.startswith("mtp.")}
    rewrite(tmp_path, {name: raw[name] for name in raw if not name.startswith("mtp.")})
    (tmp_path / file).parent.mkdir(exist_ok=True)
    mx.save_safetensors(str(tmp_path / file), head)
    weights = load(tmp_path)
    assert_equal_to_raw(weights, raw)
    assert any(file in repair for repair in weights.repairs)


@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize("raw_head", [False, True])
@pytest.mark.parametrize("raw_body", [False, True])
def test_the_norms_of_an_mtp_head_are_shifted_exactly_once(tmp_path, raw_body, raw_head, own_file):
    """Deciding by the presence of `mtp.*` double-shifted the norms in at least six code bases."""
    write_checkpoint(tmp_path)
    raw = load_tensors(tmp_path)
    converted = convert_tensors(raw)
    body = {n: t for n, t in (raw if raw_body else converted).items() if "mtp." not in n}
    head = {n: t for n, t in (raw if raw_head else converted).items() if "mtp." in n}
    rewrite(tmp_path, body if own_file else body | head)
    if own_file:
        mx.save_safetensors(str(tmp_path / "mtp.safetensors"), head)
    if raw_body and not raw_head and not own_file:
        return  # inside a raw model the head is raw by definition
    weights = load(tmp_path)
    assert_equal_to_packed(weights, raw)
    assert any("MTP head is in the" in repair for repair in weights.repairs) == (raw_body != raw_head)


@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize("shifted", ["layer", "outside", "one", "all but one"])
def test_each_norm_of_an_mtp_head_is_shifted_by_its_own_values(tmp_path, shifted, own_file):
    """Converters that know the names of a layer's norms leave the head's own three as they are."""
    write_checkpoint(tmp_path, dtype=mx.float32)
    raw, converted = load_tensors(tmp_path), convert_tensors(load_tensors(tmp_path))
    names = [name for name in converted if "mtp." in name and "norm" in name]
    chosen = {
        "layer": [name for name in names if "mtp.layers." in name],
        "outside": [name for name in names if "mtp.layers." not in name],
        "one": names[:1],
        "all but one": names[1:],
    }[shifted]
    plain = {name.partition("mtp.")[2]: tensor for name, tensor in raw.items() if name.startswith("mtp.")}
    head = {n: t for n, t in converted.items() if "mtp." in n}
    head |= {n: plain[n.partition("mtp.")[2]] for n in names if n not in chosen}
    body = {n: t for n, t in converted.items() if "mtp." not in n}
    rewrite(tmp_path, body if own_file else body | head)
    if own_file:
        mx.save_safetensors(str(tmp_path / "mtp.safetensors"), head)
    weights = load(tmp_path)
    assert_equal_to_raw(weights, raw)
    assert any("1 was added to some norms of the MTP head" in repair for repair in weights.repairs)


def test_norms_that_look_converted_in_a_raw_head_are_said(tmp_path):
    write_checkpoint(tmp_path)
    tensors = load_tensors(tmp_path)
    tensors["mtp.norm.weight"] = tensors["mtp.norm.weight"] + 1
    weights = load(rewrite(tmp_path, tensors))
    assert any(
        "look converted in a raw model" in repair and "mtp.norm" in repair for repair in weights.repairs
    )


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 4.0, "group_size": 32.0, "mode": "affine"},
        {"bits": 4, "group_size": None, "mode": None},
        {"bits": 4, "quant_method": "mlx"},
        {
            "bits": 4,
            "quant_method": None,
            "language_model.model.embed_tokens": {"group_size": None, "bits": 4},
        },
        {"bits": 4, "language_model.model.embed_tokens": {"mode": None}},
        {"bits": 4, "awq": {"alpha": 0.5, "bits": "auto"}, "notes": ["x"], "language_model.model.norm": True},
    ],
)
def test_a_hint_that_fits_is_no_reason_for_a_notice(tmp_path, quantization):
    write_checkpoint(tmp_path / "raw")
    quantize_checkpoint(tmp_path / "raw", tmp_path / "packed", (4, 32, "affine"))
    folder = rewrite(tmp_path / "packed", load_tensors(tmp_path / "packed"), quantization=quantization)
    assert not any("config.json says" in repair for repair in load(folder).repairs)


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 77, "group_size": -1, "mode": "zz"},
        {"bits": "4", "group_size": 32},
        {"bits": [4]},
        {"bits": True},
        {"bits": 4, "group_size": {}},
        {"bits": 4, "mode": ["affine"]},
        {"quant_method": 7},
    ],
)
def test_a_hint_that_is_wrong_is_said_once_and_the_shapes_are_used(tmp_path, quantization):
    write_checkpoint(tmp_path / "raw")
    quantize_checkpoint(tmp_path / "raw", tmp_path / "packed", (4, 32, "affine"))
    folder = rewrite(tmp_path / "packed", load_tensors(tmp_path / "packed"), quantization=quantization)
    weights = load(folder)
    assert_equal_to_packed(weights, load_tensors(tmp_path / "raw"))
    assert len([repair for repair in weights.repairs if "config.json says" in repair]) == 1


def test_a_quantization_of_a_model_that_is_not_packed_is_said(tmp_path):
    write_checkpoint(tmp_path)
    folder = rewrite(tmp_path, load_tensors(tmp_path), quantization={"a": {"bits": [4]}, "bits": "4"})
    assert "config.json speaks of a quantization, and no tensor is packed" in load(folder).repairs


@pytest.mark.parametrize("left", [0, 1])
def test_a_stale_index_beside_whole_weights_is_left_aside(tmp_path, left):
    write_checkpoint(tmp_path, shards=2)
    tensors = load_tensors(tmp_path)
    mx.eval(tensors)
    index = (tmp_path / INDEX_NAME).read_bytes()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    for path in shards[left:]:
        path.unlink()
    save_shards(tmp_path, tensors)
    (tmp_path / INDEX_NAME).write_bytes(index)
    weights = load(tmp_path)
    assert_equal_to_raw(weights, tensors)
    assert any("index names files that are not in the folder" in repair for repair in weights.repairs)


def test_a_stale_index_beside_shards_of_other_names_is_left_aside(tmp_path):
    write_checkpoint(tmp_path, shards=3)
    tensors, index = load_tensors(tmp_path), (tmp_path / INDEX_NAME).read_bytes()
    mx.eval(tensors)
    for path in tmp_path.glob("model-*.safetensors"):
        path.unlink()
    save_shards(tmp_path, tensors, shards=2)
    (tmp_path / INDEX_NAME).write_bytes(index)
    assert_equal_to_raw(load(tmp_path), tensors)


def test_a_part_of_an_mtp_head_is_refused_by_the_missing_name(tmp_path):
    write_checkpoint(tmp_path)
    tensors = load_tensors(tmp_path)
    del tensors["mtp.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(WeightsError, match=r"mtp\.layers\.0\.self_attn\.k_proj is missing"):
        load(rewrite(tmp_path, tensors))


@pytest.mark.parametrize(("said", "stored"), [(1, False), (0, True)])
def test_the_files_and_not_the_config_say_whether_there_is_an_mtp_head(tmp_path, said, stored):
    write_checkpoint(tmp_path, mtp=stored)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = said
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load(tmp_path)
    assert weights.has_mtp == stored
    assert any("MTP head" in repair for repair in weights.repairs)


def test_geometry_wins_over_a_config_that_says_otherwise(tmp_path):
    write_checkpoint(tmp_path / "raw")
    quantize_checkpoint(tmp_path / "raw", tmp_path / "converted", (6, 32, "affine"))
    wrong = {"bits": 4, "group_size": 64, "mode": "affine", "language_model.model.embed_tokens": False}
    weights = load(rewrite(tmp_path / "converted", load_tensors(tmp_path / "converted"), quantization=wrong))
    assert_equal_to_packed(weights, load_tensors(tmp_path / "raw"))
    said = [repair for repair in weights.repairs if "affine 6-bit group 32" in repair]
    assert len(said) == 2
    assert "dense" in said[0]
    assert "affine 4-bit group 64" in said[1]


def test_what_is_not_the_language_model_is_ignored_and_said(tmp_path):
    write_checkpoint(tmp_path, tied=True)
    extra = {
        "model.visual.patch_embed.proj.weight": mx.zeros((4, 3, 2, 2)),
        "vision_tower.blocks.0.norm1.weight": mx.zeros(8),
        "model.language_model.layers.3.self_attn.rotary_emb.inv_freq": mx.zeros(4),
    }
    tensors = load_tensors(tmp_path)
    extra["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    weights = load(rewrite(tmp_path, tensors | extra))
    assert_equal_to_raw(weights, tensors)
    assert any("vision tower was ignored (2 tensors)" in repair for repair in weights.repairs)
    assert any("lm_head" in repair for repair in weights.repairs)


def test_an_untied_model_without_lm_head_is_refused_by_that_name(tmp_path):
    write_checkpoint(tmp_path, tied=False)
    tensors = load_tensors(tmp_path)
    del tensors["lm_head.weight"]
    with pytest.raises(WeightsError, match="lm_head is missing"):
        load(rewrite(tmp_path, tensors))


@pytest.mark.parametrize("raw", [False, True])
def test_norms_that_contradict_the_conv1d_are_refused(tmp_path, raw):
    write_checkpoint(tmp_path)
    stored = load_tensors(tmp_path)
    converted = convert_tensors(stored, "model.language_model.")
    shapes, values = (stored, converted) if raw else (converted, stored)
    mixed = {n: values[n] if n.endswith("norm.weight") else t for n, t in shapes.items()}
    with pytest.raises(WeightsError, match=r"conv1d\.weight is in the .* layout, but the norm weights have"):
        load(rewrite(tmp_path, mixed))


@pytest.mark.parametrize("converted", [False, True])
def test_a_model_without_a_conv1d_is_told_by_its_norms(tmp_path, converted):
    write_checkpoint(tmp_path, layer_types=["full_attention"] * 4)
    raw = load_tensors(tmp_path)
    if converted:
        rewrite(tmp_path, convert_tensors(raw))
    assert_equal_to_packed(load(tmp_path), raw)


def test_an_awq_folded_norm_with_small_values_is_still_a_converted_one(tmp_path):
    write_checkpoint(tmp_path)
    converted = convert_tensors(load_tensors(tmp_path))
    folded = {n: t / 8 if n.endswith("layernorm.weight") else t for n, t in converted.items()}
    weights = load(rewrite(tmp_path, folded))
    norm = weights.tensors["layers.0.input_layernorm"]
    assert isinstance(norm, mx.array)
    assert mx.abs(norm - 0.125).max() < 0.125


def test_loading_reads_no_tensor_but_a_few_norms(tmp_path):
    write_checkpoint(tmp_path, moe=True, vocab_size=8192)
    config = ModelConfig.load(tmp_path)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    weights = load_weights(tmp_path, config)
    assert mx.get_peak_memory() - before < weights.nbytes / 10
    assert weights.nbytes > 1_000_000


def test_links_into_the_cache_of_hugging_face_are_followed(tmp_path):
    model = tmp_path / "models--org--name"
    snapshot, blobs = model / "snapshots" / "abc123", model / "blobs"
    write_checkpoint(tmp_path / "real", shards=2)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "real").iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    alias = tmp_path / "alias"
    alias.symlink_to(snapshot)
    assert load(snapshot).nbytes == load(alias).nbytes > 0


@settings(deadline=None)
@given(
    kind=st.sampled_from(
        [(bits, group, "affine") for bits in AFFINE_BITS for group in AFFINE_GROUPS] + FLOAT
    ),
    groups=st.integers(1, 64),
)
def test_the_geometry_of_what_mlx_packs_is_solved_exactly(kind, groups):
    bits, group, mode = kind
    features = group * groups
    assume(features % 32 == 0)  # MLX packs no shorter rows
    weight, scales, *biases = mx.quantize(mx.zeros((1, features)), group, bits, mode)
    found = solve_geometry(features, weight.shape[-1], scales.shape[-1], affine=bool(biases))
    assert (found.bits, found.group_size, found.mode) == kind


@settings(deadline=None)
@given(
    features=st.integers(1, 4096),
    columns=st.integers(0, 2048),
    scales=st.integers(0, 256),
    affine=st.booleans(),
)
def test_a_solved_geometry_always_fits_the_shapes(features, columns, scales, affine):
    try:
        found = solve_geometry(features, columns, scales, affine=affine)
    except WeightsError:
        return
    assert found.bits * features == 32 * columns
    assert found.group_size * scales == features
    assert (found.mode == "affine") == affine


def test_raw_float32_and_float16_tensors_keep_their_dtype(tmp_path):
    for dtype in (mx.float32, mx.float16):
        folder = tmp_path / str(dtype)
        write_checkpoint(folder, dtype=dtype)
        assert_equal_to_raw(load(folder), load_tensors(folder))


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_mlx_lm_converted_gives_the_same_tensors(tmp_path):
    """The reference implementation's own sanitize and quantize, on the same raw model."""
    mlx_lm_utils = pytest.importorskip("mlx_lm.utils")
    nn = pytest.importorskip("mlx.nn")
    raw = tmp_path / "raw"
    write_checkpoint(raw, mtp=False)
    model, config = mlx_lm_utils.load_model(raw)
    nn.quantize(model, group_size=32, bits=5)
    converted = tmp_path / "converted"
    config["quantization"] = {"group_size": 32, "bits": 5}
    mlx_lm_utils.save_model(converted, model)
    mlx_lm_utils.save_config(config, converted / "config.json")
    weights = load(converted)
    assert_equal_to_packed(weights, load_tensors(raw))
    assert weights.repairs == ()


@needs_qtiny
def test_a_trained_raw_model_is_recognised_by_shape_and_values():
    assert_equal_to_raw(load(QTINY), load_tensors(QTINY))


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published configs are not here")
@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen3.5-0.8B", 0.75), ("Qwen3.5-27B", 26.9), ("Qwen3.5-35B-A3B", 34.7)]
)
def test_the_table_of_tensors_adds_up_to_the_published_sizes(name, billions):
    raw = json.loads((PUBLISHED / f"{name}.config.json").read_text())
    specs = body_specs(ModelConfig.parse(raw, name))
    assert sum(math.prod(spec.shape) for spec in specs.values()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_tied_config_has_no_lm_head_in_its_table():
    assert "lm_head" not in body_specs(ModelConfig.parse(tiny_config(tied=True)))
    assert "lm_head" in body_specs(ModelConfig.parse(tiny_config(tied=False)))
