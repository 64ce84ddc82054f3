"""Reports hold everything that the runtime found: each row, total and note."""

import json
from pathlib import Path

import pytest

from qchat.core import inspect_model, plan_folder
from qchat.core.checkpoint.config import ModelConfig
from qchat.core.measuring import evaluate
from qchat.core.measuring.evaluate import evaluate_models
from qchat.core.quant.plan import as_json, make_plan
from qchat.core.quant.recipes import Options
from qchat.tui.cli.main import main
from qchat.tui.text.report import report_plain
from tests.checkpoints import quantize_checkpoint, tiny_config, write_checkpoint
from tests.tui.task_results import CALIBRATED, CONVERTED, show, task

PASSAGE = "A quantized model says almost what the model that it was made from would have said. " * 2


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "raw"
    write_checkpoint(folder)
    return folder


@pytest.mark.slow
def test_an_evaluation_has_a_row_for_every_kind_of_text(raw: Path, monkeypatch: pytest.MonkeyPatch):
    packed = raw.parent / "packed"
    quantize_checkpoint(raw, packed, (4, 32, "affine"))
    monkeypatch.setattr(evaluate, "packaged_texts", lambda: {"one": PASSAGE, "two": PASSAGE[:100]})
    told = report_plain(task("eval").report(evaluate_models([packed], raw, context=128))).splitlines()
    table = told[:4]
    assert [line.split()[0] for line in table] == ["text", "one", "two", "all"]
    assert len({len(line) for line in table}) == 1


@pytest.mark.slow
def test_without_a_reference_an_evaluation_says_nothing_of_divergence(raw: Path, tmp_path: Path):
    (tmp_path / "passage.txt").write_text(PASSAGE)
    told = report_plain(
        task("eval").report(evaluate_models([raw], data=tmp_path / "passage.txt", context=64))
    )
    assert "KL" not in told


@pytest.mark.parametrize("tensors", [False, True])
def test_an_inspection_and_its_json_tell_the_same(raw: Path, tensors: bool):
    report = json.loads(json.dumps(inspect_model(raw).as_json(tensors=tensors)))
    text = report_plain(show("inspect", [], report, "--tensors" if tensors else ""))
    for row in report["tensors"] if tensors else report["classes"]:
        assert row["name" if tensors else "class"] in text
        assert row["mode"] in text
    assert all(repair in text for repair in report["repairs"])


def test_a_plan_of_a_conversion_has_every_row_total_and_note():
    plan = make_plan(ModelConfig.parse(tiny_config(intermediate_size=96)), Options("unsloth", 4))
    text = report_plain(show("convert", [], json.loads(json.dumps(as_json(plan, 100))), "x --plan"))
    assert all(row.name in text and row.mode in text for row in plan.rows)
    assert "disk needed" in text
    assert "at 100 GB/s" in text
    assert plan.notes and all(note in text for note in plan.notes)
    assert max(len(line) for line in text.splitlines()[: 3 + len(plan.rows)]) <= 100


def test_a_memory_plan_ends_in_what_is_needed_and_what_there_is(raw: Path, capsys):
    text = report_plain(task("plan").report(plan_folder(raw)))
    *_, total, free = text.splitlines()
    assert total.startswith("in all")
    assert free.startswith("this machine can give")
    assert main(["plan", str(raw)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(text.splitlines())


def test_a_context_that_is_too_long_to_fit_is_refused(raw: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("qchat.core.model.memory_plan.device_free_nbytes", lambda: 1 << 20)
    assert main(["plan", str(raw), "--context", "512"]) == 4
    assert "this machine has 0.0 GB" in capsys.readouterr().err


def test_a_conversion_says_what_it_cost_and_how_to_chat_with_it():
    text = report_plain(show("convert", [], CONVERTED, "old new"))
    for said in (
        "new: 11.100 GB, 2.70 bits per weight",
        "1:40 to write (200 MB of bfloat16 a second), 2:10 with all checks",
        "KL divergence 2.00e-02 nats",
        "90% of the most likely tokens equal",
        "1 shards of an earlier run",
        "changed 1 of 1 groups",
        "quantized twice",
        "qchat /models/new, or /load /models/new",
    ):
        assert said in text


def test_a_calibration_says_what_was_resumed_and_what_no_token_reached(raw: Path, tmp_path: Path, capsys):
    text = report_plain(show("calibrate", [], CALIBRATED))
    assert "after chunk 2 of an earlier run" in text and "1 of 8" in text
    (tmp_path / "text.txt").write_text(PASSAGE * 5)
    words = ["calibrate", str(raw), "-o", str(tmp_path / "made.gguf"), "--data", str(tmp_path / "text.txt")]
    assert main([*words, "--chunk-size", "32", "--chunks", "2"]) == 0
    assert "2 chunks of 32 tokens" in capsys.readouterr().out and (tmp_path / "made.gguf").exists()
