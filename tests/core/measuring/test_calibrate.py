"""Importances measured with our own runtime: what is summed, how often, and how a stopped run resumes."""

from pathlib import Path

import numpy as np
import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.conversion.layer_rounding import CALIBRATION_TEXT
from qchat.core.engine.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.machine.backend import mx
from qchat.core.measuring import calibrate
from qchat.core.measuring.calibrate import calibrate_model
from qchat.core.model.fused_layers import plain_form
from qchat.core.model.layers import rms_norm
from qchat.core.quant.imatrix import Imatrix, read_imatrix
from qchat.tui.cli.main import main
from tests.checkpoints import write_checkpoint
from tests.compare import needs_qtiny
from tests.paths import QTINY, SHARED

SIZE = 16
LLAMA = SHARED / "qtiny-24m.imatrix.gguf"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", tied=False, dtype=mx.float32)
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("<|im_start|>user\nHow deep is the well?<|im_end|>\n" * 4)
    return path


def measured(model: Path, text: Path, name: str = "imatrix.gguf", **options) -> Imatrix:
    output = model.parent / name
    calibrate_model(model, output, data=text, chunk_size=SIZE, **options)
    return read_imatrix(output, ModelConfig.load(model))


def importance(imatrix: Imatrix, name: str) -> np.ndarray:
    values = imatrix.importance(name)
    assert values is not None
    return np.array(values)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors as the `gguf` package reads them."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_every_matrix_that_multiplies_is_measured(model: Path, text: Path):
    imatrix = measured(model, text)
    assert imatrix.missing == ()
    assert imatrix.unmatched == ()
    assert {"lm_head", "mtp.fc", "mtp.layers.0.mlp.down_proj"} <= set(imatrix)
    assert (imatrix.chunk_size, imatrix.datasets) == (SIZE, ("text.txt",))


def test_the_inputs_of_the_first_layer_and_the_head_equal_the_norms_outputs(model: Path, text: Path):
    """The outputs of the first and the final norm, chunk by chunk, with the plain runtime."""
    engine = Engine.load(model)
    ids = engine.tokenizer.encode(text.read_text())
    network, first, last, chunks = engine.model, [], [], len(ids) // SIZE
    for i in range(0, chunks * SIZE, SIZE):
        chunk = ids[i : i + SIZE]
        norm = plain_form(network.layers[0]).input_norm
        first.append(rms_norm(network.embed(mx.array(chunk)), norm, engine.config.rms_norm_eps))
        last.append(network.hidden(chunk, network.new_cache())[0])
    imatrix = measured(model, text)
    for name, rows in (("layers.0.linear_attn.in_proj_qkv", first), ("lm_head", last)):
        expected = np.square(np.concatenate([np.array(part) for part in rows])).mean(axis=0)
        np.testing.assert_allclose(importance(imatrix, name), expected, rtol=1e-4)


def test_all_matrices_with_one_input_have_the_same_importances(model: Path, text: Path):
    imatrix = measured(model, text)
    for name in ("in_proj_z", "in_proj_a", "in_proj_b"):
        shared = importance(imatrix, f"layers.1.linear_attn.{name}")
        assert (shared == importance(imatrix, "layers.1.linear_attn.in_proj_qkv")).all()


def test_experts_count_the_tokens_that_chose_them(tmp_path: Path, text: Path):
    write_checkpoint(tmp_path / "model", moe=True, dtype=mx.float32)
    measured(tmp_path / "model", text)
    stored = tensors(tmp_path / "imatrix.gguf")
    tokens, top = stored["blk.0.ffn_gate_inp.weight.counts"].item(), 2
    for part in ("gate", "up", "down"):
        assert stored[f"blk.0.ffn_{part}_exps.weight.counts"].sum() == top * tokens
    # each token was seen by `top` experts, so their sums together are `top` times the router's
    experts = stored["blk.0.ffn_gate_exps.weight.in_sum2"].sum(axis=0)
    np.testing.assert_allclose(experts, top * stored["blk.0.ffn_gate_inp.weight.in_sum2"], rtol=1e-4)


def test_text_written_like_a_special_token_is_one(model: Path, tmp_path: Path):
    path = tmp_path / "marks.txt"
    path.write_text("<|im_start|>" * SIZE)
    measured(model, path)
    assert tensors(tmp_path / "imatrix.gguf")["blk.0.attn_qkv.weight.counts"].item() == SIZE


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_a_stopped_run_resumes_and_equals_an_unbroken_one(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, moe: bool
):
    monkeypatch.setattr(calibrate, "SAVE_EVERY", 2)
    model = tmp_path / "model"
    write_checkpoint(model, moe=moe, dtype=mx.float32)

    def stop(done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    whole = measured(model, text, "whole.gguf")
    with pytest.raises(KeyboardInterrupt):
        measured(model, text, progress=stop)
    output = tmp_path / "imatrix.gguf"
    assert not output.exists()
    assert calibrate_model(model, output, data=text, chunk_size=SIZE).resumed == 2
    resumed = read_imatrix(output, ModelConfig.load(model))
    assert {name: importance(resumed, name).tolist() for name in resumed} == {
        name: importance(whole, name).tolist() for name in whole
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["imatrix.gguf", "model", "text.txt", "whole.gguf"]
    )


def test_sums_of_another_text_or_damaged_ones_are_not_resumed(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calibrate, "SAVE_EVERY", 2)
    output = model.parent / "imatrix.gguf"
    partial = output.with_name(output.name + calibrate.PARTIAL_SUFFIX)

    def stop(done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, text, progress=stop)
    kept = partial.read_bytes()
    other = model.parent / "other.txt"
    other.write_text("Something else altogether, and long enough for a few chunks. " * 3)
    assert calibrate_model(model, output, data=other, chunk_size=SIZE).resumed == 0
    partial.write_bytes(kept[: len(kept) // 2])
    assert calibrate_model(model, output, data=text, chunk_size=SIZE).resumed == 0


def test_the_packaged_text_is_read_when_none_is_given(model: Path):
    assert 30_000 < CALIBRATION_TEXT.stat().st_size < 60_000
    made = calibrate_model(model, model.parent / "imatrix.gguf", chunk_size=64, chunks=2)
    assert (made.chunks, made.experts) == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 1}, "--chunk-size is 1, wanted 2 to"),
        ({"chunks": 0}, "--chunks is 0, wanted at least 1"),
        ({"chunk_size": 4096}, "tokens, and one chunk alone takes 4,096"),
        ({"data": Path("nothing.txt")}, "cannot read nothing.txt"),
    ],
)
def test_what_cannot_be_read_is_refused(model: Path, text: Path, options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        calibrate_model(model, model.parent / "imatrix.gguf", **{"data": text, **options})


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(model: Path, text: Path):
    with pytest.raises(UsageError, match="wanted a file in an existing folder"):
        calibrate_model(Path("no model"), model.parent / "missing" / "imatrix.gguf", data=text)


def test_the_command_says_what_it_wrote(model: Path, text: Path, capsys: pytest.CaptureFixture[str]):
    output = model.parent / "out.gguf"
    command = ["calibrate", str(model), "-o", str(output), "--data", str(text), "--chunk-size", "16"]
    assert main([*command, "--chunks", "2"]) == 0
    shown = capsys.readouterr()
    assert "out.gguf" in shown.out
    assert "2 chunks" in shown.out
    assert read_imatrix(output, ModelConfig.load(model)).chunk_count == 2


@needs_qtiny
@pytest.mark.skipif(not LLAMA.exists(), reason=f"there is no {LLAMA}")
def test_a_part_of_the_text_gives_nearly_what_llama_cpp_measured_on_all_of_it(tmp_path: Path):
    """All of it agrees to 0.02 %, says `tests/peers/imatrix_agreement.py`; mixed-up channels would not."""
    output = tmp_path / "ours.gguf"
    calibrate_model(QTINY, output, data=SHARED / "qtiny-24m.calibration.txt", chunks=8)
    config = ModelConfig.load(QTINY)
    ours, theirs = read_imatrix(output, config), read_imatrix(LLAMA, config)
    for name in theirs:
        logs = np.log(importance(ours, name)), np.log(importance(theirs, name))
        assert np.corrcoef(*logs)[0, 1] > 0.95, name
        assert np.median(np.abs(logs[0] - logs[1])) < 0.2, name
