"""Conversion on tiny models: what lands in the folder, what is refused, what an interruption leaves."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import deserialize

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.header import read_header
from qchat.core.checkpoint.packed import Packed
from qchat.core.checkpoint.shards import find_shards
from qchat.core.checkpoint.weights import load_weights
from qchat.core.conversion import convert as converting
from qchat.core.conversion import pipeline, source
from qchat.core.conversion.convert import UNQUANTIZED, Conversion, convert
from qchat.core.conversion.report import Report
from qchat.core.conversion.source import Source, to_dense
from qchat.core.conversion.verify import probe_ids, stream_logits
from qchat.core.conversion.writer import ShardWriter, make_unit, split_shards
from qchat.core.engine.engine import Engine
from qchat.core.errors import QchatError, UsageError, WeightsError
from qchat.core.events import Notice
from qchat.core.machine.backend import mx
from qchat.core.quant.folds import Folds
from qchat.core.quant.imatrix import Statistics, write_imatrix
from qchat.core.quant.recipes import VARIANTS, Options, Recipe
from tests.checkpoints import (
    fp8_checkpoint,
    load_tensors,
    quantize_checkpoint,
    raw_tensors,
    tiny_config,
    write_checkpoint,
    write_folder,
)
from tests.compare import relative_rms

FOUR_BITS = Options(recipe="none", bits=4)
DENSE = Options(recipe=UNQUANTIZED)
PATCHES = "model.visual.patch_embed.proj.weight"
VISION_CONFIG = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "out_hidden_size": 64,
    "in_channels": 3,
    "temporal_patch_size": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
}


def run(folder: Path, target: Path, options: Options = FOUR_BITS, **more: Any) -> Report:
    return convert(Conversion(folder, target, options, **more), lambda _: None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights_of(folder: Path) -> dict[str, Any]:
    return dict(load_weights(folder, ModelConfig.load(folder)).tensors)


def equal(a: mx.array | Packed, b: mx.array | Packed) -> bool:
    if isinstance(a, Packed) and isinstance(b, Packed):
        pairs = zip(a.arrays, b.arrays, strict=True)
        return a.geometry == b.geometry and all(mx.array_equal(x, y) for x, y in pairs)
    return isinstance(a, mx.array) and isinstance(b, mx.array) and bool(mx.array_equal(a, b))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "raw", tied=False)
    return tmp_path / "raw"


@pytest.fixture
def seeing(tmp_path: Path) -> Path:
    """A raw model with a part of a vision tower."""
    config = {**tiny_config(), "vision_config": VISION_CONFIG}
    tower = {
        PATCHES: mx.random.normal((8, 3, 2, 4, 4)).astype(mx.bfloat16),
        "model.visual.merger.norm.bias": mx.random.normal((8,)).astype(mx.bfloat16),
    }
    write_folder(tmp_path / "seeing", config, raw_tensors(config) | tower)
    (tmp_path / "seeing/preprocessor_config.json").write_text("{}")
    return tmp_path / "seeing"


# --- what is written ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moe"), [*((name, True) for name in VARIANTS), ("UD-Q3_K_XL", False), ("MXFP4_K_XL", False)]
)
def test_every_tensor_is_the_loaded_one_as_mlx_packs_it(name: str, moe: bool, tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=moe, hidden_size=128)
    report = run(tmp_path / "raw", tmp_path / "new", VARIANTS[name])
    before, after = weights_of(tmp_path / "raw"), weights_of(tmp_path / "new")
    recipe = Recipe.build(VARIANTS[name], ModelConfig.load(tmp_path / "raw"))
    assert before.keys() == after.keys()
    for module, tensor in before.items():
        geometry = recipe.decide(module, tensor.shape)
        if geometry is None:
            exact = module.endswith(("A_log", "dt_bias"))  # kept in float32
            wanted = tensor if exact else tensor.astype(mx.bfloat16).astype(tensor.dtype)
        else:
            triple = (geometry.group_size, geometry.bits, geometry.mode)
            words, scales, *biases = mx.quantize(tensor, *triple[:2], mode=triple[2])
            wanted = Packed(words, scales, biases[0] if biases else None, *triple)
        assert equal(after[module], wanted), module
    assert report.plan.total_bytes == sum(tensor.nbytes for tensor in load_tensors(tmp_path / "new").values())


def test_the_folder_is_laid_out_as_mlx_checkpoints_are(raw: Path, tmp_path: Path):
    run(raw, tmp_path / "new", Options(recipe="unsloth", bits=2))
    stored = load_tensors(tmp_path / "new")
    prefix = "language_model.model.layers.0"
    assert stored[f"{prefix}.linear_attn.conv1d.weight"].shape[1:] == (4, 1)
    assert stored[f"{prefix}.linear_attn.A_log"].dtype == mx.float32
    assert stored[f"{prefix}.mlp.gate_proj.scales"].dtype == mx.bfloat16
    assert {"language_model.lm_head.weight", "language_model.mtp.fc.weight"} <= stored.keys()
    index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert read_header(tmp_path / "new/model-00001-of-00001.safetensors").metadata == {"format": "mlx"}


def test_the_reference_implementation_of_safetensors_reads_what_was_written(raw: Path, tmp_path: Path):
    run(raw, tmp_path / "new", Options(recipe="unsloth", bits=2))
    wanted = load_tensors(tmp_path / "new")
    for file in (tmp_path / "new").glob("*.safetensors"):
        for name, tensor in deserialize(file.read_bytes()):
            array = wanted.pop(name)
            data = memoryview(mx.contiguous(array).view(mx.uint8))  # pyright: ignore[reportArgumentType]
            assert tensor["shape"] == list(array.shape)
            assert bytes(tensor["data"]) == bytes(data), name
    assert not wanted


def test_the_config_names_what_differs_from_its_top_level(raw: Path, tmp_path: Path):
    run(raw, tmp_path / "new", Options(recipe="unsloth", bits=2))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (raw, tmp_path / "new"))
    said = after.pop("quantization")
    assert said == after.pop("quantization_config")
    assert after == before
    assert (said["bits"], said["group_size"], said["mode"]) == (2, 64, "affine")
    assert said["language_model.lm_head"] == {"bits": 5, "group_size": 64, "mode": "affine"}
    assert "language_model.model.layers.0.mlp.gate_proj" not in said
    assert load_weights(tmp_path / "new", ModelConfig.load(tmp_path / "new")).repairs == ()


def test_tokenizer_template_and_generation_config_are_copied(raw: Path, tmp_path: Path):
    (raw / "chat_template.jinja").write_text("{{ messages[0].content }}")
    run(raw, tmp_path / "new")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "new" / name).read_bytes() == (raw / name).read_bytes()


def test_the_model_card_tells_what_was_done(raw: Path, tmp_path: Path):
    (raw / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Raw\n")
    flags = ("-q", "--q-bits", "4")
    report = run(raw, tmp_path / "new", flags=flags)
    card = (tmp_path / "new/README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\npipeline_tag: text-generation\nbase_model: raw\n")
    assert "license: apache-2.0\n" in card.split("---")[1]
    assert "qchat convert -i raw -o new -q --q-bits 4" in card
    assert "| mlp down | affine 4-bit group 64 | 4 |" in card
    assert f"a relative RMS of {report.check.logits_error:.2e}" in card
    assert "nats" not in card  # so few tokens say nothing of the quality
    assert "## Rounding\n\n- as the published variants: by MLX\n" in card


def test_the_card_of_a_model_that_is_not_packed_has_no_word_on_rounding(raw: Path, tmp_path: Path):
    run(raw, tmp_path / "new", DENSE)
    assert "## Rounding" not in (tmp_path / "new/README.md").read_text()


def test_shards_are_filled_in_name_order_up_to_their_limit(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(raw, tmp_path / "whole")
    monkeypatch.setattr(converting, "SHARD_NBYTES", 60_000)
    run(raw, tmp_path / "new")
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    count = len(files)
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)
    ]
    stored = [name for file in files for name in sorted(dict(mx.load(str(file))))]  # pyright: ignore
    assert stored == sorted(stored)
    assert count > 3
    logits = [Engine.load(tmp_path / name).logits([1, 2]) for name in ("whole", "new")]
    assert mx.array_equal(logits[0], logits[1])


@pytest.mark.parametrize("choice", ["keep", "drop", "split"])
def test_the_mtp_head_goes_where_it_should(choice: Any, raw: Path, tmp_path: Path):
    run(raw, tmp_path / "new", Options(recipe="unsloth", bits=3, mtp=choice))
    config = ModelConfig.load(tmp_path / "new")
    weights = load_weights(tmp_path / "new", config)
    assert weights.has_mtp == (choice != "drop") == bool(config.mtp_num_hidden_layers)
    assert (tmp_path / "new/mtp.safetensors").exists() == (choice == "split")
    if choice != "drop":
        head = weights.tensors["mtp.layers.0.mlp.up_proj"]
        assert isinstance(head, Packed)
        assert str(head.geometry) == "affine 8-bit group 64"
        assert equal(weights.tensors["mtp.norm"], _rounded(weights_of(raw)["mtp.norm"]))
    assert all("differ" not in repair and "says" not in repair for repair in weights.repairs)


def _rounded(norm: mx.array) -> mx.array:
    return norm.astype(mx.bfloat16).astype(mx.float32)


def test_the_vision_tower_is_copied_in_the_layout_of_mlx(seeing: Path, tmp_path: Path):
    report = run(seeing, tmp_path / "new")
    before, after = load_tensors(seeing), load_tensors(tmp_path / "new")
    assert mx.array_equal(
        after["vision_tower.patch_embed.proj.weight"], before[PATCHES].transpose(0, 2, 3, 4, 1)
    )
    assert after["vision_tower.patch_embed.proj.weight"].dtype == mx.bfloat16
    assert mx.array_equal(after["vision_tower.merger.norm.bias"], before["model.visual.merger.norm.bias"])
    assert (tmp_path / "new/preprocessor_config.json").exists()
    assert "image-text-to-text" in (tmp_path / "new/README.md").read_text()
    assert report.vision
    run(tmp_path / "new", tmp_path / "again", DENSE, dequantize=True)
    again = load_tensors(tmp_path / "again")
    for name in ("vision_tower.patch_embed.proj.weight", "vision_tower.merger.norm.bias"):
        assert mx.array_equal(again[name], after[name])


def test_the_vision_tower_is_dropped_on_demand(seeing: Path, tmp_path: Path):
    run(seeing, tmp_path / "new", Options(recipe="none", bits=4, vision="drop"))
    assert not any("vision" in name for name in load_tensors(tmp_path / "new"))
    assert json.loads((tmp_path / "new/config.json").read_text())["language_model_only"] is True
    assert not (tmp_path / "new/preprocessor_config.json").exists()


# --- sources ---


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_fp8_becomes_what_its_bfloat16_expansion_would(moe: bool, tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=moe, hidden_size=256, intermediate_size=192)
    fp8_checkpoint(tmp_path / "raw", tmp_path / "fp8")
    run(tmp_path / "fp8", tmp_path / "wide", DENSE, dequantize=True)
    run(tmp_path / "fp8", tmp_path / "direct")
    run(tmp_path / "wide", tmp_path / "indirect")
    direct, indirect = weights_of(tmp_path / "direct"), weights_of(tmp_path / "indirect")
    assert all(equal(direct[name], indirect[name]) for name in direct)
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())


def test_a_converted_folder_is_dequantized_exactly(raw: Path, tmp_path: Path):
    quantize_checkpoint(raw, tmp_path / "packed", (4, 64, "affine"))
    run(tmp_path / "packed", tmp_path / "wide", DENSE, dequantize=True)
    packed, wide = weights_of(tmp_path / "packed"), weights_of(tmp_path / "wide")
    for name, tensor in packed.items():
        exact = name.endswith(("A_log", "dt_bias"))
        wanted = tensor.dequantize(mx.bfloat16) if isinstance(tensor, Packed) else tensor
        assert equal(wide[name], wanted if exact else wanted.astype(mx.bfloat16).astype(wanted.dtype))


def test_requantizing_warns_and_copies_what_is_packed_as_wanted(raw: Path, tmp_path: Path):
    quantize_checkpoint(raw, tmp_path / "packed", (4, 64, "affine"))
    heard: list[Any] = []
    options = Options(recipe="unsloth", bits=4)
    report = convert(Conversion(tmp_path / "packed", tmp_path / "new", options), heard.append)
    assert "a second time" in next(event.text for event in heard if isinstance(event, Notice))
    assert report.warnings
    before, after = load_tensors(tmp_path / "packed"), load_tensors(tmp_path / "new")
    name = "language_model.model.layers.0.mlp.gate_proj.weight"
    assert mx.array_equal(before[name], after[name])
    assert len(json.loads((tmp_path / "new/conversion.json").read_text())["warnings"]) == 1


def test_experts_stored_one_by_one_give_the_same_folder_as_stacked_ones(tmp_path: Path):
    write_checkpoint(tmp_path / "stacked", moe=True)
    write_checkpoint(tmp_path / "each", moe=True, experts="each", shards=3)
    for name in ("stacked", "each"):
        run(tmp_path / name, tmp_path / f"new-{name}")
    one, other = load_tensors(tmp_path / "new-stacked"), load_tensors(tmp_path / "new-each")
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["raw", "each", "fp8", "packed"])
def test_slices_of_a_source_put_together_are_what_the_loader_gives(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(source, "SLICE_NBYTES", 1 << 14)
    write_checkpoint(
        tmp_path / "raw", moe=True, hidden_size=256, experts="each" if kind == "each" else "stacked"
    )
    folder = tmp_path / ("raw" if kind == "each" else kind)
    if kind == "fp8":
        fp8_checkpoint(tmp_path / "raw", folder)
    elif kind == "packed":
        quantize_checkpoint(tmp_path / "raw", folder, (8, 32, "mxfp8"))
    opened = Source.open(folder)
    for name, tensor in weights_of(folder).items():
        assert equal(opened.read(name), tensor), name
        if opened.specs[name].kind == "matrix":
            parts = [to_dense(opened.read(name, *span), mx.float32) for span in opened.slices(name)]
            assert mx.array_equal(mx.concatenate(parts), to_dense(tensor, mx.float32)), name
    assert any(len(list(opened.slices(n))) > 1 for n in opened.specs if opened.specs[n].kind == "matrix")


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_the_layer_by_layer_forward_pass_is_the_engines(moe: bool, tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=moe, tied=not moe)
    run(tmp_path / "raw", tmp_path / "new")
    folders = (tmp_path / "raw", tmp_path / "new")
    opened = [Source.open(folder) for folder in folders]
    ids = probe_ids(opened[0])
    for folder, logits in zip(folders, stream_logits(opened, ids, lambda *_: None), strict=True):
        assert relative_rms(logits, Engine.load(folder).logits(ids)) < 1e-5


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "SLICE_NBYTES", 1 << 16)
    write_checkpoint(tmp_path / "raw", vocab_size=1 << 17)  # an embedding of 16 MiB
    opened = Source.open(tmp_path / "raw")
    spec = opened.specs["embed_tokens"]
    recipe = Recipe.build(FOUR_BITS, opened.config)
    units = [make_unit("embed_tokens", spec, recipe.decide("embed_tokens", spec.shape), bare_mtp=False)]
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    with ShardWriter(tmp_path, split_shards(units, 1 << 30)[0]) as file:
        for piece in pipeline.convert_slices(opened, Folds(), units):
            for part, array in piece.arrays.items():
                file.write(piece.unit.arrays[part], array, piece.begin)
    assert mx.get_peak_memory() - base < 2 << 20


# --- importance ---


def made_up_imatrix(folder: Path, path: Path) -> Path:
    """Importance of every matrix of the layers, a few channels far above the others."""
    statistics = {}
    for name, spec in Source.open(folder).specs.items():
        if spec.kind == "matrix" and name.startswith("layers."):
            *stack, _, columns = spec.shape
            sums = mx.exp(3 * mx.random.normal((*stack, columns)))
            statistics[name] = Statistics(sums, mx.ones(stack or (1,)))
    config = ModelConfig.load(folder)
    write_imatrix(path, statistics, config, datasets=["x"], chunk_count=1, chunk_size=1)
    return path


@pytest.mark.slow
def test_an_imatrix_scales_and_rounds_slices_as_it_does_whole_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_checkpoint(tmp_path / "raw", moe=True, hidden_size=128)
    imatrix = made_up_imatrix(tmp_path / "raw", tmp_path / "i.gguf")
    options = Options(recipe="unsloth", bits=2)
    report = run(tmp_path / "raw", tmp_path / "whole", options, imatrix=imatrix, awq="fixed")
    monkeypatch.setattr(source, "SLICE_NBYTES", 1 << 14)
    run(tmp_path / "raw", tmp_path / "sliced", options, imatrix=imatrix, awq="fixed")
    run(tmp_path / "raw", tmp_path / "off", options, imatrix=imatrix, awq="off")
    run(tmp_path / "raw", tmp_path / "none", options)
    whole, sliced, off, none = (weights_of(tmp_path / name) for name in ("whole", "sliced", "off", "none"))
    assert any(group.changed for group in report.folds.report)
    assert all(equal(whole[name], sliced[name]) for name in whole)
    up = "layers.0.mlp.switch_mlp.up_proj"
    assert not equal(whole[up], off[up])
    assert not equal(off[up], none[up])
    assert "## Activation-aware scaling" in (tmp_path / "whole/README.md").read_text()


# --- how often the source is read ---


def count_calls(function: Callable[..., Any], counts: Counter[str], patch: pytest.MonkeyPatch) -> None:
    """Count the calls of `function` by name and path, whichever module of ours makes them."""

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        counts[f"{function.__name__} {path}"] += 1
        return function(path, *arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("qchat.") and vars(module).get(function.__name__) is function:
            patch.setattr(module, function.__name__, counted)


@pytest.mark.slow
@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
def test_a_conversion_opens_its_source_once(
    with_imatrix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each header was read three times, the shards were listed five times, and each slice opened its file."""
    raw, counts = tmp_path / "raw", Counter[str]()
    write_checkpoint(raw, moe=True, shards=3, hidden_size=128)
    imatrix = made_up_imatrix(raw, tmp_path / "i.gguf") if with_imatrix else None
    count_calls(find_shards, counts, monkeypatch)
    count_calls(read_header, counts, monkeypatch)
    opens = Path.open

    def count_opens(path: Path, *arguments: Any, **options: Any) -> Any:
        counts[f"open {path}"] += 1
        return opens(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", count_opens)
    run(raw, tmp_path / "new", Options(recipe="unsloth", bits=3), imatrix=imatrix)
    files = sorted(raw.glob("*.safetensors"))
    assert len(files) == 3
    assert counts[f"find_shards {raw}"] == 1
    for file in files:
        assert counts[f"read_header {file}"] == 1
        assert counts[f"open {file}"] == 2  # for its header, and for all of its slices
    assert counts[f"open {raw / 'config.json'}"] == 1


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "more", "sentence"),
    [
        (DENSE, {"dequantize": True}, "--dequantize would change nothing"),
        (DENSE, {"imatrix": Path("x")}, "--imatrix-path would change nothing"),
        (Options(recipe="none", bits=4, vision="drop"), {}, "--vision drop would change nothing"),
    ],
)
def test_what_would_change_nothing_is_refused(
    options: Options, more: dict[str, Any], sentence: str, raw: Path, tmp_path: Path
):
    with pytest.raises(UsageError, match=sentence):
        run(raw, tmp_path / "new", options, **more)
    assert names(tmp_path) == ["raw"]


def test_an_imatrix_that_steers_no_rounding_needs_scaling(raw: Path, tmp_path: Path):
    imatrix = made_up_imatrix(raw, tmp_path / "i.gguf")
    floats = Options(recipe="none", bits=4, mode="mxfp4")
    with pytest.raises(UsageError, match="--awq off would change nothing: no affine module"):
        run(raw, tmp_path / "new", floats, imatrix=imatrix, awq="off")
    assert names(tmp_path) == ["i.gguf", "raw"]
    run(raw, tmp_path / "affine", FOUR_BITS, imatrix=imatrix, awq="off")


def test_a_quantized_source_needs_a_word_about_it(raw: Path, tmp_path: Path):
    quantize_checkpoint(raw, tmp_path / "packed", (4, 64, "affine"))
    with pytest.raises(UsageError, match="give -q to quantize it again, or --dequantize"):
        run(tmp_path / "packed", tmp_path / "new", DENSE)


@pytest.mark.parametrize("place", ["", "inside", "../raw/inside"])
def test_the_source_folder_is_no_destination(place: str, raw: Path):
    with pytest.raises(UsageError, match="never written to"):
        run(raw, raw / place, force=True)


def test_a_destination_in_no_folder_is_refused(raw: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="which does not exist"):
        run(raw, tmp_path / "no/new")


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_written(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", vocab_size=64)
    with pytest.raises(QchatError, match="do not belong together"):
        run(tmp_path / "raw", tmp_path / "new")
    assert names(tmp_path) == ["raw"]


def test_a_template_that_is_a_link_to_elsewhere_is_not_copied(raw: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("{}")
    (raw / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(QchatError, match="outside its model folder"):
        run(raw, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_source_that_changes_meanwhile_is_refused(raw: Path, tmp_path: Path):
    def meddle(_event: Any) -> None:
        os.utime(raw / "model.safetensors", ns=(1, 1))

    with pytest.raises(WeightsError, match="changed while it was being converted"):
        convert(Conversion(raw, tmp_path / "new", FOUR_BITS), meddle)
    assert not (tmp_path / "new").exists()


def test_weights_that_were_damaged_while_writing_are_refused(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def upside_down(self: ShardWriter, array: Any, values: mx.array, row: int = 0) -> None:
        put(self, array, values[::-1] if values.ndim > 1 else values, row)

    put = ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", upside_down)
    with pytest.raises(WeightsError, match="the weights are damaged"):
        run(raw, tmp_path / "new")
    assert not (tmp_path / "new").exists()
