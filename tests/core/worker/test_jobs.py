"""The jobs of an engine process, on a tiny model: what they tell, what they give, what they leave."""

import json
from pathlib import Path
from typing import Any

import pytest

from qchat.core.errors import UsageError
from qchat.core.measuring.measurements import Measurements
from qchat.core.worker.jobs import run_job
from qchat.core.worker.protocol import JOB_METHODS, Cancelled
from tests.checkpoints import write_checkpoint

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


class Told:
    """A reporter that keeps what it is told, and stops the job after `stop` events of progress."""

    def __init__(self, stop: int | None = None):
        self.events: list[dict[str, Any]] = []
        self._stop = stop

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if self._stop is not None and len(self.kind("progress")) > self._stop:
            raise Cancelled("cancelled")

    def kind(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


def run(method: str, report: Told, **params: Any) -> dict[str, Any]:
    """With every parameter of the method that is not given None, as the protocol has it."""
    result = run_job(method, dict.fromkeys(JOB_METHODS[method]) | params, report)
    json.dumps([result, report.events], allow_nan=False)  # both go over the pipe
    for event in report.kind("progress"):
        assert 0 <= event["done"] <= event["total"]
        assert event["detail"]
    return result


def convert(model: Path, target: Path, report: Told, bits: int = 4) -> dict[str, Any]:
    options = {"bits": bits, "group_size": 32}
    return run("convert", report, source=str(model), target=str(target), options=options)


def test_a_conversion_tells_its_stages_and_gives_its_report(model: Path, tmp_path: Path):
    report = Told()
    result = convert(model, tmp_path / "tiny-4bit", report)
    stages = {event["detail"].split()[0] for event in report.kind("progress")}
    assert {"writing", "checking"} <= stages
    assert result["name"] == "tiny-4bit"
    assert result["nbytes"] > 0


def test_a_conversion_that_is_stopped_leaves_nothing(model: Path, tmp_path: Path):
    with pytest.raises(Cancelled):
        convert(model, tmp_path / "tiny-4bit", Told(stop=3))
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_counts_its_chunks(model: Path, text: Path, tmp_path: Path):
    report = Told()
    output = str(tmp_path / "imatrix.gguf")
    result = run(
        "calibrate", report, model=str(model), output=output, data=str(text), chunk_size=64, chunks=3
    )
    assert [event["done"] for event in report.kind("progress")] == [0, 1, 2, 3]
    assert (result["path"], result["chunks"]) == (output, 3)


@pytest.mark.slow
def test_an_evaluation_gives_scores_and_keeps_what_it_measured(model: Path, tmp_path: Path):
    convert(model, tmp_path / "tiny-4bit", Told())
    measurements, report = tmp_path / "measured" / "all.jsonl", Told()
    params = {"models": [str(tmp_path / "tiny-4bit")], "reference": str(model)}
    (result,) = run("eval", report, **params, measurements=str(measurements))["rows"]
    assert result["overall"]["kl_mean"] > 0
    assert {event["unit"] for event in report.kind("progress")} == {"tokens"}
    assert len({event["detail"] for event in report.kind("progress")}) == 2
    kept = Measurements(measurements).find(tmp_path / "tiny-4bit")
    assert kept == json.loads(json.dumps({"reference": str(model), **result["overall"]}))


@pytest.mark.slow
def test_an_evaluation_of_another_text_is_not_kept(model: Path, text: Path, tmp_path: Path):
    measurements = tmp_path / "all.jsonl"
    params = {"models": [str(model)], "reference": str(model), "data": str(text)}
    (result,) = run("eval", Told(), **params, measurements=str(measurements))["rows"]
    assert result["overall"]["kl_mean"] == 0
    assert not measurements.exists()


def test_a_comparison_has_two_answers_and_their_distance(model: Path, tmp_path: Path):
    convert(model, tmp_path / "tiny-4bit", Told())
    settings = {"max_new_tokens": 12, "enable_thinking": False, "temperature": 0.0}
    report = Told()
    models = [str(model), str(tmp_path / "tiny-4bit")]
    result = run("compare", report, models=models, text="hello", settings=settings)
    assert [row["model"] for row in result["rows"]] == ["tiny", "tiny-4bit"]
    assert result["rows"] == report.kind("row")
    assert result["kl_mean"] > 0
    assert 0 <= result["top1_agreement"] <= 1
    sides = [event["side"] for event in report.events if "side" in event]
    assert sides == sorted(sides)
    said = "".join(event["text"] for event in report.kind("text") if event["side"] == 1)
    assert said == result["rows"][1]["text"]


def test_a_model_compared_with_itself_is_no_distance_away(model: Path):
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    result = run("compare", Told(), models=[str(model)] * 2, text="hello", settings=settings)
    assert result["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert result["top1_agreement"] == 1
    assert result["rows"][0]["text"] == result["rows"][1]["text"]


def test_models_with_different_tokens_are_compared_by_their_answers_alone(model: Path, tmp_path: Path):
    other = tmp_path / "other"
    write_checkpoint(other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[65:67]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = Told()
    settings = {"max_new_tokens": 40, "seed": 1}
    result = run("compare", report, models=[str(model), str(other)], text=first + second, settings=settings)
    assert result["kl_mean"] is None
    assert "different tokens" in report.kind("notice")[-1]["text"]


@pytest.mark.slow
def test_a_bench_gives_a_row_for_each_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qchat.core.measuring.bench.PREFILL_LENGTHS", (64,))
    monkeypatch.setattr("qchat.core.measuring.bench.SUSTAINED_TOKENS", 32)
    measurements, report = tmp_path / "all.jsonl", Told()
    result = run("bench", report, models=[str(model)], runs=1, measurements=str(measurements))
    assert result["rows"] == report.kind("row")
    assert result["rows"][0]["decode_tokens_per_s"] > 0
    assert report.kind("progress")[0]["detail"] == "tiny: loading"
    assert Measurements(measurements).find(model)["decode_tokens_per_s"] > 0


def test_a_folder_is_inspected_and_planned_for(model: Path):
    assert run("inspect", Told(), model=str(model), tensors=True)["tensors"]
    assert run("plan", Told(), source=str(model), options={"bits": 4, "group_size": 32})


@pytest.mark.parametrize(
    ("method", "params", "told"),
    [
        ("convert", {"options": {"bits": "4"}}, "bits is '4', wanted int"),
        ("convert", {"options": {"mxfp": 1}}, "mxfp is 1, wanted bool"),
        ("convert", {"options": {"mtp": "lose"}}, "mtp"),
        ("convert", {"options": {"vision": "lose"}}, "vision"),
        ("convert", {"options": {"mode": "int3"}}, "mode"),
        ("convert", {"options": {"fast": True}}, "unknown option 'fast'"),
        ("convert", {"awq": "perhaps"}, "awq is 'perhaps'"),
    ],
)
def test_a_wrong_choice_is_refused_by_name(
    model: Path, tmp_path: Path, method: str, params: dict[str, Any], told: str
):
    with pytest.raises(UsageError, match=told):
        run(method, Told(), source=str(model), target=str(tmp_path / "x"), **params)
    assert list(tmp_path.iterdir()) == []
