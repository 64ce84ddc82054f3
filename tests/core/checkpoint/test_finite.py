"""Weights that are not finite: named when the model is loaded, when it answers, and in conversions."""

from pathlib import Path

import pytest

from qchat.core.conversation.session import load_session
from qchat.core.conversion.convert import UNQUANTIZED, Conversion, convert
from qchat.core.engine.engine import Engine
from qchat.core.errors import QchatError, WeightsError
from qchat.core.machine.backend import mx
from qchat.core.quant.recipes import Options
from tests.checkpoints import load_tensors, quantize_checkpoint, save_shards, write_checkpoint

LAYER = "model.language_model.layers.3."
PACKED = "language_model.model.layers.3.mlp.down_proj"
NAN, INFINITY = float("nan"), float("inf")


def damage(folder: Path, name: str, value: float, at: int = 5) -> Path:
    tensors = load_tensors(folder)
    flat = tensors[name].flatten()
    flat[at] = value
    tensors[name] = flat.reshape(tensors[name].shape)
    mx.eval(tensors)
    save_shards(folder, tensors)
    return folder


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (LAYER + "input_layernorm.weight", "layers.3.input_layernorm"),
        (LAYER + "self_attn.q_norm.weight", "layers.3.self_attn.q_norm"),
        ("model.language_model.layers.0.linear_attn.A_log", "layers.0.linear_attn.A_log"),
        ("model.language_model.layers.0.linear_attn.dt_bias", "layers.0.linear_attn.dt_bias"),
        ("model.language_model.norm.weight", "norm"),
        ("mtp.norm.weight", "mtp.norm"),
    ],
)
def test_a_vector_is_checked_when_it_is_loaded(tmp_path: Path, stored: str, name: str, value: float):
    write_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match=rf"\b{name}\b.*finite"):
        Engine.load(damage(tmp_path, stored, value, at=1))


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_the_scales_of_a_packed_matrix_are_checked_when_it_is_loaded(tmp_path: Path, part: str):
    write_checkpoint(tmp_path / "raw")
    quantize_checkpoint(tmp_path / "raw", tmp_path / "packed", (4, 32, "affine"))
    with pytest.raises(WeightsError, match=r"layers\.3\.mlp\.down_proj holds a value"):
        Engine.load(damage(tmp_path / "packed", f"{PACKED}.{part}", NAN))


@pytest.mark.parametrize(
    ("triple", "nan"), [((4, 32, "mxfp4"), 255), ((8, 32, "mxfp8"), 255), ((4, 16, "nvfp4"), 127)]
)
def test_the_scales_of_a_float_matrix_are_checked_when_it_is_loaded(tmp_path: Path, triple, nan: int):
    write_checkpoint(tmp_path / "raw")
    quantize_checkpoint(tmp_path / "raw", tmp_path / "packed", triple)
    with pytest.raises(WeightsError, match=r"layers\.3\.mlp\.down_proj holds a value"):
        Engine.load(damage(tmp_path / "packed", f"{PACKED}.scales", nan))


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (LAYER + "mlp.down_proj.weight", r"layers\.3\.mlp\.down_proj"),
        (LAYER + "self_attn.v_proj.weight", r"layers\.3\.self_attn\.v_proj"),
        ("model.language_model.layers.0.linear_attn.conv1d.weight", r"layers\.0\.linear_attn\.conv1d"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_matrix_is_found_by_the_first_logits(tmp_path: Path, stored: str, name: str, value: float):
    write_checkpoint(tmp_path, tied=False)
    engine = Engine.load(damage(tmp_path, stored, value))
    with pytest.raises(WeightsError, match=rf"the tensor {name} holds a value"):
        engine.logits([1, 2, 3])


def test_a_token_whose_embedding_is_damaged_is_found_by_the_reply_that_reads_it(tmp_path: Path):
    write_checkpoint(tmp_path, tied=False)
    [id] = Engine.load(tmp_path).tokenizer.encode("q")
    folder = damage(tmp_path, "model.language_model.embed_tokens.weight", NAN, at=id * 64)
    session = load_session(folder, max_new_tokens=2)
    session.send("a", enable_thinking=False)
    with pytest.raises(QchatError, match="embed_tokens holds a value"):
        session.send("q", enable_thinking=False)


@pytest.mark.parametrize("recipe", [UNQUANTIZED, "none"])
@pytest.mark.parametrize("name", ["mlp.down_proj.weight", "input_layernorm.weight"])
def test_a_conversion_refuses_it_and_leaves_nothing(tmp_path: Path, recipe: str, name: str):
    write_checkpoint(tmp_path / "raw")
    folder = damage(tmp_path / "raw", LAYER + name, NAN)
    with pytest.raises(WeightsError, match=rf"layers\.3\.{name.removesuffix('.weight')}.*finite"):
        convert(Conversion(folder, tmp_path / "new", Options(recipe)), lambda _: None)
    assert not (tmp_path / "new").exists()


def test_healthy_scales_of_every_mode_pass(tmp_path: Path):
    write_checkpoint(tmp_path / "raw")
    for triple in ((4, 32, "affine"), (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")):
        folder = tmp_path / triple[2]
        quantize_checkpoint(tmp_path / "raw", folder, triple)
        engine = Engine.load(folder)
        assert mx.isfinite(engine.logits([1, 2])).all()
