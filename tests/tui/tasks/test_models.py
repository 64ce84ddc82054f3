"""`qchat models`: the two lists, the JSON, and deleting with a confirmation."""

import io
import json
import sys
from pathlib import Path

import pytest

from qchat.core.hub import cache as hubcache
from qchat.tui.cli.main import main
from tests.checkpoints import write_checkpoint
from tests.tui.fake_terminal import FakeTerminal


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models folder, with one model."""
    monkeypatch.setattr(hubcache.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("QCHAT_MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    write_checkpoint(tmp_path / "models/tiny")
    return tmp_path / "models/tiny"


def test_models_lists_what_is_here_and_what_could_be(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    here, known = capsys.readouterr().out.split(
        "Published models; `qchat pull ID` or /load ID downloads one\n"
    )
    rows = {line.split()[0]: line.split()[1:] for line in here.splitlines()[2:] if line}
    assert rows.keys() == {"tiny", "embedded"}
    assert rows["tiny"][:4] == ["16.01", "1", "MB", "yes,"]
    assert rows["tiny"][5:] == ["GB", "left", "-", "-", "4,096", "models", "folder"]
    assert "Brooooooklyn/Qwen3.6-27B-UD-Q2_K_XL-mlx" in known and "15.6 GB" in known


def test_a_model_that_cannot_be_loaded_is_listed_with_the_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "model.safetensors").unlink()
    assert main(["models"]) == 0
    assert f"models folder: {folder} has no weights" in capsys.readouterr().out


def test_a_folder_of_models_that_vanished_is_explained(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("QCHAT_MODELS_DIR", "/Volumes/Tiny SSD/models")
    assert main(["models"]) == 0
    sentence = "the models folder /Volumes/Tiny SSD/models is on /Volumes/Tiny SSD, which is not mounted"
    assert capsys.readouterr().err == f"qchat: {sentence}\n"


def test_the_lists_as_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["models", "--json"]) == 0
    lists = json.loads(capsys.readouterr().out)
    tiny = next(model for model in lists["models"] if model["name"] == "tiny")
    assert tiny["path"] == str(folder) and tiny["fit"]["fits"] and tiny["problem"] is None
    assert all(model["fit"].keys() >= {"fits", "needed_nbytes"} for model in lists["published"])


def test_a_terminal_is_asked_before_a_model_is_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "stdin", FakeTerminal("n\n"))
    assert main(["models", "rm", "tiny"]) == 0
    assert folder.exists()
    assert capsys.readouterr().err == f"tiny: 0.00 GB in 5 files in {folder}\nDelete it? [y/N] "
    monkeypatch.setattr(sys, "stdin", FakeTerminal("y\n"))
    assert main(["models", "rm", "tin"]) == 0
    assert not folder.exists()


def test_where_nobody_can_be_asked_yes_must_be_said(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["models", "rm", "tiny"]) == 2
    assert folder.exists() and "--yes" in capsys.readouterr().err
    (folder / "notes.txt").write_text("mine")
    assert main(["models", "rm", "tiny", "--yes"]) == 0
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert "also holds notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("tinny", 3), ("/", 3), ("built-in", 2)])
def test_only_what_is_listed_is_deleted(
    folder: Path, name: str, code: int, capsys: pytest.CaptureFixture[str]
):
    assert main(["models", "rm", name, "--yes"]) == code
    assert folder.exists() and capsys.readouterr().err.count("\n") == 1
