"""Facts that a model folder states in two places, which may contradict each other."""

import json
from pathlib import Path
from typing import Any

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.conversion.convert import UNQUANTIZED, Conversion, convert
from qchat.core.engine.engine import Engine
from qchat.core.errors import WeightsError
from qchat.core.machine.backend import mx
from qchat.core.quant.recipes import Options
from tests.checkpoints import load_tensors, quantize_checkpoint, save_shards, tiny_config, write_checkpoint
from tests.compare import relative_rms

FLAGS = [None, True, False]
IDS = range(40, 60)
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def write(folder: Path, outer: bool | None, nested: bool | None, head: str) -> None:
    """A model whose flags are as given; its `head` is "absent", a "copy" of the embedding, or "own"."""
    write_checkpoint(folder, tied=True)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for fields, flag in ((raw, outer), (raw["text_config"], nested)):
        fields.pop("tie_word_embeddings")
        fields |= {} if flag is None else {"tie_word_embeddings": flag}
    path.write_text(json.dumps(raw))
    tensors = load_tensors(folder)
    own = (0.1 * mx.random.normal(tensors[EMBEDDING].shape, key=mx.random.key(9))).astype(mx.bfloat16)
    heads = {"absent": {}, "copy": {HEAD: tensors[EMBEDDING]}, "own": {HEAD: own}}
    save_shards(folder, tensors | heads[head])


def logits(folder: Path) -> mx.array:
    return Engine.load(folder).logits(IDS)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, mx.array]:
    root = tmp_path_factory.mktemp("wanted")
    write(root / "tied", True, True, "absent")
    write(root / "own", False, False, "own")
    return {name: logits(root / name) for name in ("tied", "own")}


@pytest.mark.parametrize("outer", FLAGS)
@pytest.mark.parametrize("nested", FLAGS)
def test_a_stored_head_is_used_whatever_the_flags_say(outer, nested, wanted, tmp_path: Path):
    write(tmp_path, outer, nested, "own")
    assert relative_rms(logits(tmp_path), wanted["own"]) < 1e-6


@pytest.mark.parametrize("outer", FLAGS)
@pytest.mark.parametrize("nested", FLAGS)
def test_a_head_that_equals_the_embedding_is_the_same_tied_or_not(outer, nested, wanted, tmp_path: Path):
    write(tmp_path, outer, nested, "copy")
    assert relative_rms(logits(tmp_path), wanted["tied"]) < 1e-6


@pytest.mark.parametrize("outer", FLAGS)
@pytest.mark.parametrize("nested", FLAGS)
def test_without_a_stored_head_the_outer_flag_decides(outer, nested, wanted, tmp_path: Path):
    write(tmp_path, outer, nested, "absent")
    if nested if outer is None else outer:
        assert relative_rms(logits(tmp_path), wanted["tied"]) < 1e-6
    else:
        with pytest.raises(WeightsError, match="lm_head is missing"):
            logits(tmp_path)


def test_a_packed_head_beside_a_packed_embedding_is_used(wanted, tmp_path: Path):
    write(tmp_path / "raw", False, False, "own")
    quantize_checkpoint(tmp_path / "raw", tmp_path / "packed", (8, 32, "affine"))
    before = logits(tmp_path / "packed")
    path = tmp_path / "packed/config.json"
    raw = json.loads(path.read_text())
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = True
    path.write_text(json.dumps(raw))
    assert relative_rms(logits(tmp_path / "packed"), before) < 1e-6
    assert relative_rms(before, wanted["own"]) < 0.5  # rounding; the tied head is off by 1.4


def test_a_used_head_is_said_and_a_conversion_keeps_it(wanted, tmp_path: Path):
    write(tmp_path / "raw", True, True, "own")
    engine = Engine.load(tmp_path / "raw")
    assert any("another head is stored, which is used" in repair for repair in engine.model.repairs)
    convert(Conversion(tmp_path / "raw", tmp_path / "new", Options(UNQUANTIZED)), lambda _: None)
    raw = json.loads((tmp_path / "new/config.json").read_text())
    assert raw["tie_word_embeddings"] is raw["text_config"]["tie_word_embeddings"] is False
    assert relative_rms(logits(tmp_path / "new"), wanted["own"]) < 0.5


def test_contradicting_flags_are_said():
    raw = tiny_config()
    assert not ModelConfig.parse(raw).notes
    raw["tie_word_embeddings"] = False
    assert any("false and true in text_config" in note for note in ModelConfig.parse(raw).notes)


def parse(outer: dict[str, Any], nested: dict[str, Any]) -> ModelConfig:
    raw = tiny_config()
    raw["text_config"] |= nested
    return ModelConfig.parse(raw | outer)


def test_a_reply_ends_at_the_end_tokens_of_both_places():
    assert parse({"eos_token_id": 7}, {"eos_token_id": [5, 7]}).eos_token_ids == (5, 7)
    assert parse({"eos_token_id": [7]}, {"eos_token_id": None}).eos_token_ids == (7,)


def test_quantization_is_found_in_both_places_and_the_outer_one_counts():
    assert parse({}, {"quantization_config": {"bits": 3}}).quantization == {"bits": 3}
    assert parse({"quantization": {"bits": 4}}, {"quantization": {"bits": 3}}).quantization == {"bits": 4}
