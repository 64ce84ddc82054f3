"""`qchat eval`: its arguments, its streams, the figures that reach stdout."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qchat.core.errors import UsageError
from qchat.core.measuring.evaluate import evaluate_models
from qchat.core.measuring.results import Evaluation, Evaluations, Flip, Score
from qchat.core.worker import jobs
from qchat.tui.cli import verbs
from qchat.tui.cli.main import main
from qchat.tui.text.report import report_plain
from tests.checkpoints import write_checkpoint
from tests.tui.fake_terminal import FakeTerminal
from tests.tui.task_results import task

SCORE = Score("prose", 100, 12.5, 12.0, 0.01, 0.2, 0.975, (0.005, 0.015))
FLIP = Flip("prose", "to be or not to", " be", "\n", 1.5)
EVALUATION = Evaluation("small", "large", 512, (SCORE,), SCORE, 2 * 10**9, (FLIP,))
CLOSER = replace(EVALUATION, model="medium", nbytes=3 * 10**9, overall=replace(SCORE, kl_mean=0.001))
PAIR = Evaluations((CLOSER, EVALUATION), (None, (0.008, 0.01)))


class Evaluator:
    """Stands in for evaluate_models and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Evaluations:
        kwargs.pop("report")("reading with small", 50, 100)
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error
        return Evaluations((EVALUATION,), (None,)) if len(args[0]) == 1 else PAIR


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Evaluator:
    """With the folders `small` and `large` at hand."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "small")  # whose figures are kept
    Path("large").mkdir()
    evaluator = Evaluator()
    monkeypatch.setattr(jobs, "evaluate_models", evaluator)
    return evaluator


def test_the_words_reach_the_evaluation(evaluator: Evaluator, capsys: pytest.CaptureFixture[str]):
    words = ["small", "--reference", "large", "--data", "text.txt", "--context", "256", "--flips", "7"]
    assert verbs.run("eval", words) == 0
    assert evaluator.calls == [
        (
            ([Path("small").absolute()], Path("large").absolute()),
            {"data": Path("text.txt").absolute(), "context": 256, "flips": 7},
        ),
    ]
    told = report_plain(task("eval").report(Evaluations((EVALUATION,), (None,))))
    assert capsys.readouterr() == (told, "")


def test_by_default_there_is_no_reference_and_the_text_is_ours(evaluator: Evaluator):
    verbs.run("eval", ["small"])
    assert evaluator.calls == [(([Path("small").absolute()], None), {"data": None})]


@pytest.mark.usefixtures("evaluator")
def test_json_is_one_object_with_the_figures(capsys: pytest.CaptureFixture[str]):
    assert verbs.run("eval", ["small", "--reference", "large", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["reference"], report["context"]) == ("small", "large", 512)
    assert report["overall"] == report["scores"][0] == json.loads(json.dumps(vars(SCORE)))
    assert report["flips"] == [vars(FLIP)]


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
    monkeypatch.setattr(jobs, "evaluate_models", evaluate_models)
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
        "95",
        "%",
        "99",
        "%",
        "KL",
        "top-1",
    ]
    assert row.split()[:2] == ["note", "41"]
    assert row.split()[4:] == ["0.000000", "0.0000", "to", "0.0000", "0.00000", "100.00", "%"]


# --- several models ---


def told(result: Evaluations) -> str:
    return report_plain(task("eval").report(result))


def test_several_models_are_listed_by_size_with_how_far_they_are_behind():
    header, small, medium, *_ = told(PAIR).splitlines()
    assert header.split("  ")[0] == "model" and header.rstrip().endswith("behind the closest")
    assert small.split()[:2] == ["small", "2"] and small.rstrip().endswith("0.0080 to 0.0100")
    assert medium.split()[:2] == ["medium", "3"] and "0.0050 to 0.0150" in medium


def test_tokens_that_flip_are_listed_with_what_comes_before_them():
    line = next(line for line in told(PAIR).splitlines() if "to be or not to" in line)
    assert line.split() == ["medium", "prose", "…to", "be", "or", "not", "to", "be", "↵", "1.50"]


@pytest.mark.usefixtures("evaluator")
@pytest.mark.parametrize(("option", "plotted"), [((), True), (("--plot",), True), (("--no-plot",), False)])
def test_the_curve_of_size_and_quality_is_drawn_unless_it_is_unwanted(
    capsys: pytest.CaptureFixture[str], option: tuple[str, ...], plotted: bool
):
    write_checkpoint(Path("medium"))
    words = ["small", "medium", "--reference", "large", *option]
    assert verbs.run("eval", words) == 0
    assert ("B small" in capsys.readouterr().out) is plotted


@pytest.mark.usefixtures("evaluator")
def test_json_of_several_models_has_a_row_for_each(capsys: pytest.CaptureFixture[str]):
    Path("medium").mkdir()
    assert verbs.run("eval", ["small", "medium", "--reference", "large", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["rows"]] == ["medium", "small"]
    assert found["behind"] == [None, [0.008, 0.01]]


@pytest.mark.parametrize("count", ["-1", "21"])
def test_a_number_of_flips_out_of_range_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: str
):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    assert main(["eval", "model", "--flips", count]) == 2
    assert f"--flips is {count}, wanted 0 to 20" in capsys.readouterr().err
