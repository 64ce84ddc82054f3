"""`qchat eval`: its arguments, its streams, the figures that reach stdout."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qchat.core.errors import UsageError
from qchat.core.measuring.evaluate import evaluate_model
from qchat.core.measuring.results import Evaluation, Score
from qchat.core.worker import jobs
from qchat.tui.cli import verbs
from qchat.tui.cli.main import main
from qchat.tui.text.report import report_plain
from tests.checkpoints import write_checkpoint
from tests.tui.fake_terminal import FakeTerminal
from tests.tui.task_results import task

SCORE = Score("prose", 100, 12.5, 12.0, 0.01, 0.2, 0.975)
EVALUATION = Evaluation("small", "large", 512, (SCORE,), SCORE)


class Evaluator:
    """Stands in for evaluate_model and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Evaluation:
        kwargs.pop("report")("reading with small", 50, 100)
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error
        return EVALUATION


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Evaluator:
    """With the folders `small` and `large` at hand."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "small")  # whose figures are kept
    Path("large").mkdir()
    evaluator = Evaluator()
    monkeypatch.setattr(jobs, "evaluate_model", evaluator)
    return evaluator


def test_the_words_reach_the_evaluation(evaluator: Evaluator, capsys: pytest.CaptureFixture[str]):
    words = ["small", "--reference", "large", "--data", "text.txt", "--context", "256"]
    assert verbs.run("eval", words) == 0
    assert evaluator.calls == [
        (
            (Path("small").absolute(), Path("large").absolute()),
            {"data": Path("text.txt").absolute(), "context": 256},
        ),
    ]
    assert capsys.readouterr() == (report_plain(task("eval").report(EVALUATION)), "")


def test_by_default_there_is_no_reference_and_the_text_is_ours(evaluator: Evaluator):
    verbs.run("eval", ["small"])
    assert evaluator.calls == [((Path("small").absolute(), None), {"data": None})]


@pytest.mark.usefixtures("evaluator")
def test_json_is_one_object_with_the_figures(capsys: pytest.CaptureFixture[str]):
    assert verbs.run("eval", ["small", "--reference", "large", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["reference"], report["context"]) == ("small", "large", 512)
    assert report["overall"] == report["scores"][0] == vars(SCORE)


@pytest.mark.parametrize("fails", [False, True])
def test_a_terminal_sees_the_progress_until_it_is_over(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch, fails: bool
):
    stderr = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    evaluator.error = UsageError("no") if fails else None
    if fails:
        with pytest.raises(UsageError):
            verbs.run("eval", ["small"])
    else:
        verbs.run("eval", ["small"])
    line = " 50%  50 of 100 tokens · reading with small"
    assert stderr.getvalue() == f"\r\r{line}\r{' ' * len(line)}\r"


@pytest.mark.parametrize("words", [[], ["small", "--context", "many"], ["small", "--bits", "4"]])
def test_bad_words_are_refused_before_anything_is_loaded(evaluator: Evaluator, words: list[str]):
    with pytest.raises(UsageError, match="qchat eval --help"):
        verbs.run("eval", words)
    assert evaluator.calls == []


def test_the_command_knows_the_verb(capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "/nowhere"]) == 3
    assert "the model folder /nowhere does not exist" in capsys.readouterr().err


def test_a_real_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(jobs, "evaluate_model", evaluate_model)
    write_checkpoint(tmp_path / "model")
    (tmp_path / "note.txt").write_text("A text that is long enough to be measured.")
    words = [
        str(tmp_path / "model"),
        "--reference",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "note.txt"),
    ]
    assert verbs.run("eval", words) == 0
    header, row, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "text",
        "tokens",
        "perplexity",
        "reference",
        "mean",
        "KL",
        "99",
        "%",
        "KL",
        "top-1",
    ]
    assert row.split()[:2] == ["note", "41"]
    assert row.split()[4:] == ["0.000000", "0.00000", "100.00", "%"]
