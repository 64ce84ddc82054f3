"""`qchat inspect`: its arguments and what reaches stdout."""

import json
from pathlib import Path

import pytest

from qchat.core import BUILT_IN_MODEL
from qchat.core.errors import ModelError, UsageError
from qchat.tui.cli import verbs
from qchat.tui.cli.main import main
from tests.checkpoints import quantize_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    write_checkpoint(folder / "raw")
    quantize_checkpoint(folder / "raw", folder / "packed", (4, 32, "affine"))
    return folder / "packed"


def test_classes_are_shown_by_default(model: Path, capsys: pytest.CaptureFixture[str]):
    assert verbs.run("inspect", [str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(model)
    down = next(line for line in lines if line.startswith("mlp down"))
    assert down.split()[2:6] == ["affine", "4-bit", "group", "32"]
    assert not any(line.startswith("layers.0") for line in lines)


def test_every_tensor_is_shown_when_asked_for(model: Path, capsys: pytest.CaptureFixture[str]):
    assert verbs.run("inspect", [str(model), "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("layers.3.self_attn.o_proj"))
    assert row.split()[1:] == [
        "affine",
        "4-bit",
        "group",
        "32",
        "64x128",
        "5,120",
    ]  # 8192 * (4 + 2 * 16 / 32) / 8


@pytest.mark.parametrize("tensors", [False, True])
def test_json_is_one_object(model: Path, capsys: pytest.CaptureFixture[str], tensors: bool):
    assert verbs.run("inspect", [str(model), "--json", *(["--tensors"] if tensors else [])]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == str(model)
    assert ("tensors" in report) == tensors
    assert {"mode", "bits", "group_size", "bytes"} <= report["classes"][0].keys()


def test_a_model_is_found_by_its_name(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "embedded"]) == 0
    assert capsys.readouterr().out.startswith(f"{BUILT_IN_MODEL}\n")


def test_the_command_knows_the_verb(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "/nowhere"]) == 3
    assert "the model folder /nowhere does not exist" in capsys.readouterr().err


def test_a_missing_folder_and_a_missing_word_are_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="does not exist"):
        verbs.run("inspect", [str(tmp_path / "none")])
    with pytest.raises(UsageError, match="qchat inspect --help"):
        verbs.run("inspect", [])


def test_a_name_that_no_path_can_have_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "x" * 5000]) == 3
    assert "is not a valid path: File name too long" in capsys.readouterr().err
