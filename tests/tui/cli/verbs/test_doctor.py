"""`qchat doctor`: what a bug report gets, and what it must not."""

import json
import os
from pathlib import Path

import pytest

import qchat.core as core
from qchat.core.kernels import launch
from qchat.core.measuring.doctor import diagnose
from qchat.core.ops import choices
from qchat.core.ops.candidates import contests
from qchat.core.ops.race import run
from qchat.core.ops.tuning import Tuner
from qchat.tui.cli import verbs
from qchat.tui.cli.main import main
from tests.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCHAT_TUNE", "auto")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "private-name"
    write_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def public(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(vars(core), "diagnose", diagnose)
    # in this process; `test_tuning.py` has the child
    monkeypatch.setattr(Tuner, "begin", lambda tuner: run(contests(tuner.dimensions), tuner.record))
    yield
    choices.forget()
    launch._distrusted.clear()
    launch._trusted.clear()


def test_it_names_the_machine_every_form_and_what_was_chosen(model: Path, capsys: pytest.CaptureFixture[str]):
    assert verbs.run("doctor", [str(model)]) == 0
    text = capsys.readouterr().out
    for word in ("mlx", "device", "memory", "bandwidth", "float32", "qwen3_5, 4 layers", "environment"):
        assert word in text
    rows = [line for line in text.splitlines() if line.startswith("delta net, ")]
    assert len(rows) == 6
    assert sum(line.endswith("chosen") for line in rows) == 3


def test_it_names_no_paths_and_no_models(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QCHAT_BLAS", "/home/somebody/lib.so")
    assert verbs.run("doctor", [str(model)]) == 0
    text = capsys.readouterr().out
    assert "QCHAT_BLAS=(a path)" in text
    for private in (model.name, str(model.parent), os.environ["HOME"], "somebody"):
        assert private not in text


def test_the_same_as_json(model: Path, capsys: pytest.CaptureFixture[str]):
    assert verbs.run("doctor", [str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] and {"mlx", "device", "environment"} <= found["facts"].keys()
    assert {row["form"] for row in found["forms"]} == {"chunked", "mlx"}
    assert {row["verdict"] for row in found["forms"]} <= {"chosen", "slower", "not clearly faster"}


def test_with_tuning_off_nothing_is_tried(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QCHAT_TUNE", "off")
    assert verbs.run("doctor", [str(model)]) == 0
    assert "no forms were tried" in capsys.readouterr().out


def test_a_folder_that_is_none_ends_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", str(tmp_path / "nowhere")]) == 3
    said = capsys.readouterr().err
    assert said.startswith("qchat: ") and said.count("\n") == 1
