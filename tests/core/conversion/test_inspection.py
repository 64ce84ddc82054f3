"""Inspection against what was written: the bytes of the files, the codes of the packing."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.layouts import body_specs
from qchat.core.conversion.inspection import Inspection, canonical_names, inspect_model
from qchat.core.errors import WeightsError
from qchat.core.machine.backend import mx
from tests.checkpoints import (
    fp8_checkpoint,
    load_tensors,
    quantize_checkpoint,
    save_shards,
    tiny_config,
    write_checkpoint,
)
from tests.compare import needs_qtiny
from tests.paths import QTINY

SHAPES: list[dict[str, Any]] = [{}, {"tied": False}, {"moe": True}, {"moe": True, "experts": "each"}]


def stored_nbytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_tensors(folder).values())


def codes(inspection: Inspection) -> dict[str, set[str]]:
    """The codes of each class in words."""
    found: dict[str, set[str]] = {}
    for row in inspection.classes:
        found.setdefault(row.kind, set()).add(str(row.code))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_the_classes_of_a_raw_folder_add_up_to_its_files(tmp_path: Path, shape: dict[str, Any]):
    write_checkpoint(tmp_path, shards=2, **shape)
    inspection = inspect_model(tmp_path)
    raw = load_tensors(tmp_path)
    assert inspection.total.nbytes == sum(row.nbytes for row in inspection.classes) == stored_nbytes(tmp_path)
    assert inspection.total.weights == sum(tensor.size for tensor in raw.values())
    assert len({tensor.name for tensor in inspection.tensors}) == len(inspection.tensors)


@pytest.mark.parametrize("moe", [False, True])
def test_each_class_shows_the_codes_that_its_tensors_were_packed_with(tmp_path: Path, moe: bool):
    def choose(path: str) -> tuple[int, int, str] | None:
        if "down_proj" in path:
            return (3, 64, "affine")
        if "mlp" in path:
            return (8, 64, "affine") if path.endswith(("mlp.gate", "expert_gate")) else (4, 32, "mxfp4")
        return (8, 32, "mxfp8") if "self_attn" in path else None

    write_checkpoint(tmp_path / "raw", moe=moe, mtp=False)
    quantize_checkpoint(tmp_path / "raw", tmp_path / "packed", choose, shards=2)
    inspection = inspect_model(tmp_path / "packed")
    found = codes(inspection)
    wanted = {
        "embed": {"bfloat16"},
        "attention q/k/v": {"mxfp8 8-bit group 32"},
        "attention o": {"mxfp8 8-bit group 32"},
        "delta qkv/z": {"bfloat16"},
        **(
            {
                "experts gate/up": {"mxfp4 4-bit group 32"},
                "experts down": {"affine 3-bit group 64"},
                "shared expert down": {"affine 3-bit group 64"},
                "router": {"affine 8-bit group 64"},
            }
            if moe
            else {"mlp gate/up": {"mxfp4 4-bit group 32"}, "mlp down": {"affine 3-bit group 64"}}
        ),
    }
    assert {kind: found[kind] for kind in wanted} == wanted
    assert inspection.total.nbytes == stored_nbytes(tmp_path / "packed")
    down = next(row for row in inspection.classes if row.kind.endswith("down"))
    assert down.bits_per_weight == pytest.approx(3 + 2 * 16 / 64)  # a bfloat16 scale and bias per 64


def test_fp8_blocks_are_shown_as_they_are_stored(tmp_path: Path):
    write_checkpoint(tmp_path / "raw")
    fp8_checkpoint(tmp_path / "raw", tmp_path / "fp8")
    inspection = inspect_model(tmp_path / "fp8")
    assert codes(inspection)["mlp down"] == {"fp8 8-bit group 128"}
    files = sum(path.stat().st_size for path in (tmp_path / "fp8").glob("*.safetensors"))
    assert 0 < files - inspection.total.nbytes < 40_000  # the header


def test_what_the_model_does_not_use_is_listed_as_such(tmp_path: Path):
    write_checkpoint(tmp_path)
    tensors = load_tensors(tmp_path)
    mx.eval(tensors)
    tensors["model.visual.patch_embed.proj.weight"] = mx.zeros((8, 3, 2, 4, 4))
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    save_shards(tmp_path, tensors)
    inspection = inspect_model(tmp_path)
    kinds = Counter(tensor.kind for tensor in inspection.tensors)
    assert (kinds["vision"], kinds["ignored"], kinds["lm_head"]) == (1, 1, 0)
    assert inspection.total.nbytes == stored_nbytes(tmp_path)
    assert any("vision tower was ignored" in repair for repair in inspection.repairs)
    assert any("the embedding is tied" in repair for repair in inspection.repairs)


def test_a_head_of_drafts_in_a_file_of_its_own_is_counted(tmp_path: Path):
    write_checkpoint(tmp_path)
    tensors = load_tensors(tmp_path)
    mx.eval(tensors)
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")}
    save_shards(tmp_path, tensors)
    mx.save_safetensors(str(tmp_path / "mtp.safetensors"), head)
    inspection = inspect_model(tmp_path)
    (row,) = [row for row in inspection.classes if row.kind == "mtp"]
    assert row.nbytes == sum(tensor.nbytes for tensor in head.values())
    assert len(row.tensors) == len(head)


def test_stacked_experts_are_part_of_two_tensors_and_single_ones_of_one():
    assert canonical_names("layers.1.mlp.experts.gate_up_proj") == [
        "layers.1.mlp.switch_mlp.gate_proj",
        "layers.1.mlp.switch_mlp.up_proj",
    ]
    assert canonical_names("mtp.layers.0.mlp.experts.31.down_proj") == [
        "mtp.layers.0.mlp.switch_mlp.down_proj"
    ]
    assert canonical_names("layers.1.mlp.shared_expert.up_proj") == ["layers.1.mlp.shared_expert.up_proj"]


def write_sparse_folder(folder: Path) -> int:
    """A raw folder of zeros whose file has no blocks on the disk; returns the bytes of its tensors."""
    raw = tiny_config(
        hidden_size=4096, intermediate_size=12288, vocab_size=248320, num_hidden_layers=16, mtp=False
    )
    raw["text_config"]["layer_types"] *= 4
    (folder / "config.json").write_text(json.dumps(raw))
    header, end = {}, 0
    for name, spec in body_specs(ModelConfig.parse(raw)).items():
        bare = name.endswith(("A_log", "dt_bias"))
        shape = [spec.shape[0], 1, spec.shape[1]] if spec.kind == "conv" else list(spec.shape)
        begin, end = end, end + 2 * mx.zeros(shape).size
        stored = f"model.language_model.{name}{'' if bare else '.weight'}"
        header[stored] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def test_a_folder_of_many_gigabytes_is_inspected_without_reading_it(tmp_path: Path):
    nbytes = write_sparse_folder(tmp_path)
    mx.clear_cache()
    mx.reset_peak_memory()
    inspection = inspect_model(tmp_path)
    assert inspection.total.nbytes == nbytes > 5 * 10**9
    assert mx.get_peak_memory() - mx.get_active_memory() < 50_000_000


def test_the_origin_of_the_template_is_told_even_if_it_is_broken(tmp_path: Path):
    write_checkpoint(tmp_path)
    assert inspect_model(tmp_path).notices == ("the chat template is in tokenizer_config.json",)
    (tmp_path / "tokenizer_config.json").unlink()
    assert "no chat template" in inspect_model(tmp_path).notices[0]
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect_model(tmp_path).notices == ("the chat template is in chat_template.jinja",)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    assert "chat_template.jinja" in inspect_model(tmp_path).notices[0]


def test_a_damaged_folder_is_refused_as_loading_it_would_be(tmp_path: Path):
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated"):
        inspect_model(tmp_path)


@pytest.mark.parametrize("tensors", [False, True])
def test_the_json_adds_up(tmp_path: Path, tensors: bool):
    write_checkpoint(tmp_path)
    inspection = inspect_model(tmp_path)
    report = json.loads(json.dumps(inspection.as_json(tensors=tensors)))
    assert report["total_bytes"] == inspection.total.nbytes
    assert sum(row["bytes"] for row in report["classes"]) == report["total_bytes"]
    assert ("tensors" in report) == tensors


@needs_qtiny
def test_the_trained_model_has_24_million_weights_of_which_3_million_draft():
    inspection = inspect_model(QTINY)
    draft = sum(row.weights for row in inspection.classes if row.kind == "mtp")
    assert (round(inspection.total.weights / 1e6, 1), round(draft / 1e6, 1)) == (24.3, 3.0)
