"""Measurements are found again for the same weights, and only for those."""

import os
from pathlib import Path

import pytest

from qchat.core.errors import ModelError, StoreError
from qchat.core.measuring.measurements import MAX_LINES, Measurements
from tests.checkpoints import write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder)
    return folder


def test_newer_figures_replace_older_ones_and_leave_others(tmp_path: Path, model: Path):
    kept = Measurements(tmp_path / "kept.jsonl")
    assert kept.find(model) == {}
    kept.add(model, {"decode_tokens_per_s": 20.0})
    kept.add(model, {"kl_mean": 0.1})
    kept.add(model, {"decode_tokens_per_s": 21.5})
    assert Measurements(tmp_path / "kept.jsonl").find(model) == {"decode_tokens_per_s": 21.5, "kl_mean": 0.1}


def test_changed_weights_have_no_measurements(tmp_path: Path, model: Path):
    kept = Measurements(tmp_path / "kept.jsonl")
    kept.add(model, {"kl_mean": 0.1})
    os.utime(next(model.glob("*.safetensors")), ns=(1, 1))
    assert kept.find(model) == {}


def test_a_damaged_line_hides_no_other(tmp_path: Path, model: Path):
    kept = Measurements(tmp_path / "kept.jsonl")
    kept.add(model, {"kl_mean": 0.1})
    with kept.path.open("ab") as file:
        file.write(b'{"weights": \xff\n[1]\nnull\n')
    kept.add(model, {"decode_tokens_per_s": 3.0})
    assert kept.find(model) == {"kl_mean": 0.1, "decode_tokens_per_s": 3.0}


def test_the_oldest_lines_go_first(tmp_path: Path, model: Path):
    kept = Measurements(tmp_path / "kept.jsonl")
    kept.path.write_text("{}\n" * (2 * MAX_LINES))
    kept.add(model, {"kl_mean": 0.1})
    assert kept.path.read_text().count("\n") == MAX_LINES
    assert kept.find(model) == {"kl_mean": 0.1}


def test_an_unwritable_file_and_a_folder_without_a_model_raise(tmp_path: Path, model: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be stored in"):
        Measurements(tmp_path / "file" / "kept.jsonl").add(model, {})
    with pytest.raises(ModelError):
        Measurements(tmp_path / "kept.jsonl").find(tmp_path / "none")
