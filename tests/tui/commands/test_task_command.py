"""The commands that make, measure and fetch models: what they ask for, what their blocks show."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qchat.core import BUILT_IN_MODEL, UNQUANTIZED, Measurements
from qchat.core.hub import library
from qchat.core.measuring.results import Score
from qchat.tui.chat.jobs import Job
from qchat.tui.commands import completions, models, task_command
from qchat.tui.tasks import convert
from qchat.tui.text.report import Bars, Gauge, Plot, Report, Spark, report_lines, report_text
from qchat.tui.user.paths import measurements_file
from tests.tui.chat_stage import ChatStage
from tests.tui.fake_front import FakeFront
from tests.tui.task_results import CALIBRATED, CONVERTED, answer_row, bench_row, evaluation, results, show

PROGRESS = {
    "event": "progress",
    "done": 3e9,
    "total": 4e9,
    "unit": "bytes",
    "detail": "layer 3",
    "seconds_left": 75.0,
}
THOUGHT = {"event": "thought", "side": 1, "text": "hm"}


def words(report: Report) -> str:
    """As drawn, so that drawing is tried."""
    drawn = ["".join(text for _, text in line) for line in report_lines(report, 80)]
    assert [
        line for line in report_lines(report, 80, unicode=False) if not "".join(t for _, t in line).isascii()
    ] == []
    return "\n".join([*drawn, report_text(report)])


def run(
    tmp_path: Path, *lines: str, steps: tuple[dict[str, Any], ...] = (), front: FakeFront | None = None
) -> ChatStage:
    stage = ChatStage(tmp_path, *steps, front=front)
    stage.play(*lines)
    return stage


def only_job(stage: ChatStage) -> Job:
    assert not stage.front.all("error")
    (job,) = stage.chat.jobs
    return job


# --- convert ---


def test_the_unquantized_recipe_is_the_runtimes():
    assert convert.UNQUANTIZED == UNQUANTIZED


def test_convert_asks_for_what_the_flags_say(tmp_path):
    step = {"method": "convert", "events": [PROGRESS], "result": CONVERTED}
    stage = run(tmp_path, "/convert embedded new -q --q-bits 2 --q-recipe unsloth --force", steps=(step,))
    job = only_job(stage)
    (asked,) = stage.fake.asked("convert")
    assert asked["source"] == str(BUILT_IN_MODEL) and asked["target"] == str(Path.cwd() / "new")
    assert (
        asked["options"]["recipe"] == "unsloth" and asked["options"]["bits"] == 2 and asked["force"] is True
    )
    assert asked["flags"] == ["-q", "--q-bits", "2", "--q-recipe", "unsloth"]
    assert job.state == "done"
    said = words(job.report())
    assert "11.100 GB, 2.70 bits per weight" in said and "quantized twice" in said and "/load" in said
    assert any(isinstance(part, Bars) for part in job.report().parts)


def test_convert_without_flags_makes_four_bits_in_the_users_folder(tmp_path):
    stage = run(tmp_path, "/convert built-in", steps=({"method": "convert", "result": CONVERTED},))
    only_job(stage)
    (asked,) = stage.fake.asked("convert")
    assert asked["target"] == str(tmp_path / "models" / "embedded-4bit")
    assert asked["options"]["bits"] == 4 and asked["flags"] == ["-q", "--q-bits", "4"]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("-q --q-mode mxfp4", "embedded-mxfp4"),
        ("-q --q-bits 3 --q-recipe unsloth", "embedded-unsloth-3bit"),
        ("--dequantize", "embedded-bf16"),
        ("-q --q-recipe mixed_2_6", "embedded-mixed_2_6"),
        ("-q", "embedded-quantized"),
    ],
)
def test_the_new_folder_is_named_after_what_is_asked(tmp_path, flags, name):
    stage = run(tmp_path, f"/convert embedded {flags}", steps=({"method": "convert", "result": CONVERTED},))
    only_job(stage)
    assert Path(stage.fake.asked("convert")[0]["target"]).name == name


def test_a_running_conversion_shows_how_far_it_is():
    notice = {"event": "notice", "text": "careful"}
    report = show("convert", [notice, PROGRESS], None, "old /new")
    assert isinstance(report.parts[-1], Gauge)
    said = words(report)
    assert "75%" in said and "3.00 of 4.00 GB" in said and "1:15 left" in said and "careful" in said
    assert "starting" in words(show("convert", [], None, "old /new"))


def test_stop_ends_the_newest_job(tmp_path):
    slow = {"method": "convert", "events": [PROGRESS] * 500, "seconds": 0.02}
    stage = ChatStage(tmp_path, slow)

    async def stop(stage: ChatStage) -> None:
        import asyncio

        while not stage.chat.jobs[0].events:
            await asyncio.sleep(0.01)
        stage.chat.stop()

    stage.play("/convert embedded", stop)
    assert only_job(stage).state == "cancelled"


# --- measuring ---


def test_eval_compares_and_plots_size_against_quality(tmp_path):
    result = evaluation(str(BUILT_IN_MODEL), 0.02, "/m/ref")
    stage = run(
        tmp_path,
        "/eval embedded --reference embedded --context 64",
        steps=({"method": "eval", "events": [PROGRESS | {"unit": "tokens"}], "result": result},),
    )
    (asked,) = stage.fake.asked("eval")
    assert asked["reference"] == str(BUILT_IN_MODEL) and asked["context"] == 64
    report = only_job(stage).report()
    said = words(report)
    assert "mean KL" in said and "0.020000" in said and "97.00 %" in said and "prose" in said
    (plot,) = [part for part in report.parts if isinstance(part, Plot)]
    assert [point.label for point in plot.points] == ["embedded", "ref"]


def test_eval_alone_has_perplexities_and_no_plot_of_one_point():
    report = show("eval", [], evaluation("/m/a", None, None))
    assert "perplexity" in words(report) and "mean KL" not in words(report)
    assert not any(isinstance(part, Plot) for part in report.parts)


def test_the_plot_has_what_was_measured_alike():
    earlier = (evaluation("/m/a", 0.1), evaluation("/m/b", 0.2, "/m/other"), evaluation("/m/c", None, None))
    report = show("eval", [], evaluation("/m/d", 0.3), earlier=earlier)
    (plot,) = [part for part in report.parts if isinstance(part, Plot)]
    assert [point.label for point in plot.points] == ["a", "d", "ref"]


def test_bench_draws_a_bar_and_the_course_of_each_model():
    rows = [bench_row("fake-4bit", 23.4), bench_row("other", 17.0, bandwidth=0, speeds=[])]
    step = {"method": "bench", "events": [rows[0], PROGRESS, rows[1]], "result": {"rows": rows}}
    partial = show("bench", [rows[0], PROGRESS], None)
    assert "23.4 tok/s" in words(partial) and isinstance(partial.parts[-1], Gauge)
    report = show("bench", step["events"], step["result"])
    said = words(report)
    assert "22.4" in said and "70%" in said and "12.00" in said
    assert len([part for part in report.parts if isinstance(part, Spark)]) == 1


def test_bench_measures_the_loaded_model_alone(tmp_path, monkeypatch):
    started = capture(monkeypatch)
    run(tmp_path, "/bench", "/bench embedded embedded --runs 1")
    (title, method, params, alone), other = started
    assert (title, method, alone) == ("bench fake-4bit", "bench", True)
    assert params == {"models": ["/models/fake-4bit"], "runs": 3}
    assert other[2] == {"models": [str(BUILT_IN_MODEL)] * 2, "runs": 1}


def capture(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any, bool]]:
    """What jobs would have been started."""
    started: list[tuple[str, str, Any, bool]] = []

    def start(_self: Any, title: str, method: str, params: Any, _render: Any, *, alone: bool = False) -> None:
        started.append((title, method, params, alone))

    monkeypatch.setattr("qchat.tui.chat.controller.Chat.start_job", start)
    return started


def test_compare_puts_the_last_question_or_a_text_to_both(tmp_path):
    rows = [answer_row("a", 20.0, "Paris."), answer_row("b", 30.0, "It is **Paris**.")]
    step = {
        "method": "compare",
        "events": [{"event": "text", "side": 0, "text": "Par"}, rows[0] | {"side": 0}, THOUGHT],
        "result": {"rows": rows, "kl_mean": 0.012, "top1_agreement": 0.9},
    }
    stage = run(
        tmp_path, "/set seed 1", "/system Short.", "Where?", "/compare embedded embedded", steps=(step,)
    )
    (asked,) = stage.fake.asked("compare")
    assert asked["text"] == "Where?" and asked["system"] == "Short." and asked["settings"] == {"seed": 1}
    said = words(only_job(stage).report())
    assert "It is **Paris**." in said and "30.0 tok/s" in said and "0.012 nats" in said and "90%" in said
    partial = step["events"]
    assert "the first model\nPar" in words(show("compare", partial[:1], None, "a b"))
    assert "Paris." in words(show("compare", partial, None, "a b"))
    assert "the second model thinks" in words(show("compare", partial, None, "a b"))
    assert "loading" in words(show("compare", [], None, "a b"))


def test_compare_says_nothing_of_a_distance_that_was_not_measured():
    rows = [answer_row("a", 20.0, "x"), answer_row("b", 30.0, "y")]
    result = {"rows": rows, "kl_mean": None, "top1_agreement": None}
    said = words(show("compare", [], result, "a b"))
    assert "nats" not in said and "different tokens" in said


def test_compare_wants_a_question(tmp_path):
    front = ChatStage(tmp_path).play("/compare embedded embedded")
    assert "there is no question yet" in front.said


def test_calibrate_writes_into_the_users_folder(tmp_path):
    step = {
        "method": "calibrate",
        "events": [PROGRESS | {"unit": "chunks", "done": 1, "total": 4}],
        "result": CALIBRATED,
    }
    stage = run(tmp_path, "/calibrate --chunks 4 --data text.txt", steps=(step,))
    (asked,) = stage.fake.asked("calibrate")
    assert asked["model"] == "/models/fake-4bit" and asked["chunks"] == 4
    assert asked["output"] == str(tmp_path / "models/fake-4bit-imatrix.gguf")
    assert asked["data"] == str(Path("text.txt").absolute())
    said = words(only_job(stage).report())
    assert "4 chunks of 512 tokens" in said and "1 of 8" in said


def test_inspect_shows_the_real_classes_of_the_embedded_model():
    from qchat.core import inspect_model

    told = inspect_model(BUILT_IN_MODEL)
    report = show("inspect", [], told.as_json())
    assert any(isinstance(part, Bars) for part in report.parts)
    assert all(kind.kind in words(report) for kind in told.classes)
    tensors = words(show("inspect", [], told.as_json(tensors=True)))
    assert told.tensors[0].name in tensors


def test_inspect_asks_for_the_loaded_model(tmp_path):
    result = results()["inspect"] | {"repairs": ["norms +1"]}
    stage = run(tmp_path, "/inspect --tensors", steps=({"method": "inspect", "result": result},))
    assert stage.fake.asked("inspect") == [{"model": "/models/fake-4bit", "tensors": True}]
    assert "norms +1" in words(only_job(stage).report())


@pytest.mark.parametrize(("limit", "alone"), [(0, False), (1 << 20, True), (1 << 40, False)])
def test_a_model_without_room_beside_the_chats_has_it_unloaded(limit, alone):
    status = SimpleNamespace(limit_nbytes=limit)
    chat: Any = SimpleNamespace(status=status, model=SimpleNamespace(nbytes=10**6), parked=False)
    assert task_command.crowded(chat, BUILT_IN_MODEL) is alone
    chat.parked = True  # another job has the memory: this one waits for it
    assert task_command.crowded(chat, BUILT_IN_MODEL)


# --- models ---


def test_load_takes_a_folder_a_name_or_the_embedded_model(tmp_path):
    stage = run(tmp_path, f"/load {BUILT_IN_MODEL}", "/model embedded", "/load built-in")
    assert [one["model"] for one in stage.fake.asked("load")[1:]] == [str(BUILT_IN_MODEL)] * 3


def test_a_model_that_is_nowhere_is_refused_with_the_nearest(tmp_path):
    front = ChatStage(tmp_path).play("/load bilt-in", f"/load {tmp_path}/absent")
    assert "built-in" in front.all("error")[0] and len(front.all("error")) == 2


def test_the_conversation_goes_over_to_the_new_model(tmp_path):
    stage = ChatStage(tmp_path)
    stage.play("hello", "/load embedded")
    assert len(stage.fake.asked("load")) == 2
    assert len(stage.fake.asked("send")) == 1
    assert library.default_model(models.places(stage.chat))[0] == BUILT_IN_MODEL


def test_without_a_name_models_are_chosen_from_a_list(tmp_path):
    front = FakeFront(str(BUILT_IN_MODEL), None)
    stage = ChatStage(tmp_path, front=front)
    stage.play("/model", "/load")
    assert any("embedded" in label for _, label in front.all("choose")[0])
    assert len(stage.fake.asked("load")) == 2


def test_models_are_listed_with_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = ChatStage(tmp_path).play("/models").said
    assert "name embedded" in said and "fits yes, " in said and "tok/s -" in said


def test_what_was_measured_of_a_model_is_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Measurements(measurements_file()).add(BUILT_IN_MODEL, {"decode_tokens_per_s": 61.25, "kl_mean": 0.0125})
    assert "tok/s 61.2, KL 0.013" in ChatStage(tmp_path).play("/models").said


def test_names_of_models_are_completed(tmp_path):
    stage = ChatStage(tmp_path)
    models._names.cache_clear()
    assert [one.line for one in completions("/load em", stage.chat)] == ["/load embedded"]
    assert "/convert embedded" in [one.line for one in completions("/convert em", stage.chat)]
    assert "/convert x --q-bits" in [one.line for one in completions("/convert x --q-b", stage.chat)]
    assert "/compare a embedded" in [one.line for one in completions("/compare a emb", stage.chat)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, _places: Any) -> Path:
        raise library.ModelNotDownloaded(f"{name} is not on this machine", name)

    monkeypatch.setattr(library, "find_model", missing)
    plan = SimpleNamespace(missing_nbytes=11e9, free_nbytes=100e9)
    monkeypatch.setattr("qchat.core.hub.listing.plan_download", lambda _id: plan)


@pytest.mark.usefixtures("hub")
def test_a_model_of_the_hub_is_fetched_only_when_the_user_agrees(tmp_path, monkeypatch):
    started = capture(monkeypatch)
    front = ChatStage(tmp_path, front=FakeFront(False)).play("/load owner/name")
    assert front.all("confirm") == ["Download owner/name: 11.00 GB, of 100 GB free on the disk?"]
    assert front.all("error") == ["owner/name was not downloaded"] and not started


def test_a_fetched_model_says_where_it_is():
    assert "/cache/x" in words(models.downloaded([], {"path": "/cache/x"}, "owner/name"))
    assert "75%" in words(models.downloaded([PROGRESS], None, "owner/name"))


def test_scores_are_those_of_the_runtime():
    assert {field.name for field in fields(Score)} >= {
        "kind",
        "tokens",
        "perplexity",
        "kl_mean",
        "kl_p99",
        "top1_agreement",
    }
