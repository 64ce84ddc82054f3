"""Jobs beside the chat in the app: how they fail and stop, and how they share memory and machine."""

from pathlib import Path
from typing import Any

import pytest

from qchat.core import Measurements, Store
from qchat.tui.chat.jobs import Job
from qchat.tui.screens.dialogs import Confirm
from qchat.tui.user.paths import measurements_file
from qchat.tui.widgets.transcript.reports import Reported
from tests.checkpoints import write_checkpoint
from tests.tui.chat_stage import ChatStage
from tests.tui.conversing import talk
from tests.tui.fake_front import FakeFront
from tests.tui.fake_jobs import PROGRESS, RESULTS_OF_JOBS
from tests.tui.running_app import Running, chatting, quick_keys

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")

SLOW = {"method": "convert", "events": [PROGRESS] * 3000, "seconds": 0.02}


def block(it: Running) -> Reported:
    """The newest report, as a job's block."""
    return [one for one in it.screen.transcript.blocks if isinstance(one, Reported)][-1]


def said(it: Running) -> str:
    """The text of the newest report; nothing before the first."""
    reports = [one for one in it.screen.transcript.blocks if isinstance(one, Reported)]
    return reports[-1].text if reports else ""


def rows(it: Running) -> list[str]:
    """What is on the screen of the conversation, without the frames of cards."""
    height = it.screen.transcript.size.height
    return [it.screen.transcript.render_line(y).text.strip(" ╭╮│╰╯─") for y in range(height)]


# --- failures ---


@pytest.mark.slow
@pytest.mark.parametrize("size", [(100, 30), (60, 16)])
@pytest.mark.parametrize("how", ["refused", "killed"])
def test_a_failed_job_is_red_whole_and_without_its_progress(tmp_path: Path, size: tuple[int, int], how: str):
    advice = "~/models/embedded-4bit exists: choose another folder, or replace it with --force at the end"
    error: dict[str, Any] = {"kind": "UsageError", "message": advice, "exit_code": 2}
    step = {"method": "convert", "events": [PROGRESS], **({"error": error} if how == "refused" else {})}
    if how == "killed":
        step["die"] = "SIGKILL"

    @chatting(tmp_path, step, size=size)
    async def check(it: Running) -> None:
        await it.say("/convert embedded")
        await it.until(lambda: it.chat.jobs and it.chat.jobs[0].state == "failed")
        await it.until(lambda: "failed" in said(it))
        await it.until(lambda: any(row.startswith("✖ convert") for row in rows(it)))
        shown = " ".join(rows(it))
        assert it.chat.jobs[0].error in " ".join(shown.split())
        assert "╌" not in shown and "starting" not in shown and "25%" not in shown
        lines = block(it).lines(it.screen.transcript._look)
        assert {span.style for line in lines for span in line.spans} == {"bad"}


def test_a_cancelled_job_shows_no_progress_either(tmp_path: Path):
    @chatting(tmp_path, SLOW)
    async def check(it: Running) -> None:
        await it.say("/convert embedded")
        await it.until(lambda: "25%" in said(it))
        await it.say("/stop")
        await it.until(lambda: "cancelled" in said(it))
        assert "25%" not in block(it).text and "starting" not in block(it).text


# --- stopping ---


class Clock:
    """A clock that goes on only when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def running_job(it: Running, clock: Clock, seconds: float) -> Job:
    """Begin a conversion and let `seconds` pass."""
    await it.say("/convert embedded")
    await it.until(lambda: it.chat.running_jobs and it.chat.jobs[0].events)
    clock.now += seconds
    return it.chat.jobs[0]


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
def test_long_work_ends_only_at_the_second_press(tmp_path: Path, key: str):
    clock = Clock()

    @chatting(tmp_path, SLOW, clock=clock)
    async def check(it: Running) -> None:
        job = await running_job(it, clock, 12 * 60 + 5)
        shown = it.screen.keymap.shown("stop" if key == "escape" else "interrupt")
        for _ in range(2):  # the second one comes too late
            clock.now += 60
            await it.pilot.press(key)
            assert not job.stopping
            assert f"{shown} again stops the convert" in it.keys
        assert "14 min in" in it.keys
        await it.pilot.press(key)
        assert job.stopping or job.state == "cancelled"
        assert "stopping the convert…" in it.keys
        await it.until(lambda: job.state == "cancelled")
        assert it.app.screen is it.screen


def test_young_work_ends_at_once_and_says_so(tmp_path: Path):
    clock = Clock()

    @chatting(tmp_path, {**SLOW, "seconds": 60.0}, clock=clock)
    async def check(it: Running) -> None:
        await it.say("/convert embedded")
        await it.until(lambda: it.engine.asked("convert"))
        (job,) = it.chat.jobs
        clock.now += 9
        await it.pilot.press("escape")
        assert job.stopping and "stopping the convert…" in it.keys
        await it.until(lambda: "stopping…" in said(it))
        for _ in range(3):
            await it.pilot.press("escape")
        assert it.app.screen is it.screen and job.stopping
        assert job.client is not None
        job.client.kill()
        await it.until(lambda: job.state == "cancelled")


def test_a_press_for_one_job_does_not_end_another(tmp_path: Path):
    clock = Clock()

    @chatting(tmp_path, SLOW, {**SLOW, "method": "eval"}, clock=clock)
    async def check(it: Running) -> None:
        job = await running_job(it, clock, 60)
        await it.pilot.press("escape")
        await it.say("/eval")
        await it.until(lambda: len(it.chat.running_jobs) == 2)
        clock.now += 0.5
        await it.pilot.press("escape")  # the young one ends, the old one was not asked for
        await it.until(lambda: it.chat.jobs[1].state == "cancelled")
        assert job.state == "running" and not job.stopping


@pytest.mark.parametrize("way", ["ctrl+q", "/bye"])
def test_leaving_asks_before_it_ends_long_work(tmp_path: Path, way: str):
    clock = Clock()

    async def leave(it: Running) -> None:
        await (it.say(way) if way.startswith("/") else it.pilot.press(way))
        await it.until(lambda: isinstance(it.app.screen, Confirm))

    @chatting(tmp_path, SLOW, clock=clock)
    async def check(it: Running) -> None:
        job = await running_job(it, clock, 65)
        await leave(it)
        await it.pilot.press("n")
        await it.until(lambda: it.app.screen is it.screen)
        assert job.state == "running" and it.app.return_value is None
        await leave(it)
        await it.pilot.press("y")
        await it.until(lambda: it.app.return_value == "shell")
        assert job.state == "cancelled"


# --- sharing the machine ---


def bench_step(folder: Path, **step: Any) -> dict[str, Any]:
    row = {**RESULTS_OF_JOBS["bench"]["rows"][0], "path": str(folder)}
    return {"method": "bench", "events": [row], "result": {"rows": [row]}, **step}


@pytest.mark.slow
@pytest.mark.parametrize("beside", [True, False])
def test_a_benchmark_beside_other_work_says_so_and_is_not_kept(tmp_path: Path, beside: bool):
    """Whatever the engine begins by itself disturbs a measurement that has begun."""
    model = tmp_path / "models" / "measured"
    write_checkpoint(model)
    step = bench_step(model)
    events = [PROGRESS] * (100 if beside else 1) + step["events"]

    @chatting(tmp_path, step | {"events": events, "seconds": 0.02}, models_dir=[str(tmp_path / "models")])
    async def check(it: Running) -> None:
        await it.say("/bench measured")
        await it.until(lambda: any(job.method == "bench" for job in it.chat.jobs))
        job = next(job for job in it.chat.jobs if job.method == "bench")
        if beside:
            await it.until(lambda: job.events)
            tell = it.chat.client and it.chat.client.on_background
            assert tell is not None
            tell("compiling")
        await it.until(lambda: job.state == "done")
        await it.until(lambda: not it.chat.parked)
        await it.until(lambda: ("not comparable" in said(it)) == beside and "25.0" in said(it))
        kept = Measurements(measurements_file()).find(model)
        assert kept.get("decode_tokens_per_s") == (None if beside else 25.0)
        assert not {"event", "place", "against"} & kept.keys()


def test_speeds_compared_while_a_reply_is_written_are_marked(tmp_path: Path):
    step = {"method": "compare", "events": [PROGRESS] * 3000, "seconds": 0.02}

    @chatting(tmp_path, step)
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.say("/compare embedded embedded")
        await it.until(lambda: it.chat.jobs and it.chat.jobs[0].events)
        assert "not comparable" not in block(it).text
        await it.ask("two")
        await it.until(lambda: "not comparable" in said(it))
        await it.say("/stop")


def models_here(folder: Path, *names: str) -> list[str]:
    for name in names:
        write_checkpoint(folder / "models" / name)
    return [str(folder / "models")]


def names(it: Running, method: str) -> Job:
    return next(job for job in it.chat.jobs if job.method == method)


@pytest.mark.slow
def test_a_benchmark_waits_for_other_jobs_and_can_be_taken_out_of_the_queue(tmp_path: Path):
    places = models_here(tmp_path, "measured")
    slow = {**SLOW, "method": "eval"}

    @chatting(tmp_path, slow, bench_step(tmp_path / "models" / "measured"), models_dir=places)
    async def check(it: Running) -> None:
        await it.say("/eval")
        await it.until(lambda: it.engine.asked("eval"))
        await it.say("/bench measured")
        await it.until(lambda: "waits for eval fake" in said(it))
        assert "queued, esc takes it out" in block(it).text
        await it.pilot.press("escape")  # at once, however long it has waited
        await it.until(lambda: names(it, "bench").state == "cancelled")
        await it.until(lambda: "cancelled" in said(it) and "waits" not in said(it))
        assert names(it, "eval").state == "running" and not names(it, "eval").stopping
        assert it.chat.model is not None and not it.engine.asked("unload")
        await it.say("/bench measured")
        await it.until(lambda: it.chat.jobs[-1].waits_for)
        assert not it.engine.asked("bench")
        names(it, "eval").cancel()
        await it.until(lambda: it.chat.jobs[-1].state == "done")
        assert not it.chat.jobs[-1].overlapped
        await it.until(lambda: not it.chat.parked and it.chat.model is not None)

    assert Measurements(measurements_file()).find(tmp_path / "models" / "measured")


@pytest.mark.slow
def test_a_benchmark_waits_for_the_reply_and_what_is_queued_behind_it(tmp_path: Path):
    places = models_here(tmp_path, "measured")
    slow = {"method": "send", "answer": "word " * 30, "seconds": 0.02}

    @chatting(tmp_path, slow, bench_step(tmp_path / "models" / "measured"), models_dir=places)
    async def check(it: Running) -> None:
        await it.say("one")
        await it.until(lambda: it.phase == "answering")
        await it.say("two")
        await it.say("/bench measured")
        await it.until(lambda: it.chat.jobs)
        await it.until(lambda: "waits for the reply" in said(it))
        await it.until(lambda: names(it, "bench").state == "done")
        methods = [request["method"] for request in it.engine.requests()]
        assert methods[: methods.index("bench")] == ["load", "send", "send", "unload"]
        assert not names(it, "bench").overlapped


def test_other_jobs_wait_for_a_benchmark_that_runs(tmp_path: Path):
    places = models_here(tmp_path, "measured")
    bench = bench_step(tmp_path / "models" / "measured", events=[PROGRESS] * 3000, seconds=0.02)

    @chatting(tmp_path, bench, models_dir=places)
    async def check(it: Running) -> None:
        await it.say("/bench measured")
        await it.until(lambda: it.engine.asked("bench"))
        await it.say("/inspect measured")
        await it.until(lambda: "waits for bench measured" in said(it))
        assert not it.engine.asked("inspect")
        names(it, "bench").cancel()
        await it.until(lambda: names(it, "inspect").state == "done")
        assert not names(it, "bench").overlapped


def test_the_status_row_says_who_has_the_memory_and_what_waits(tmp_path: Path):
    folder = tmp_path / "models" / "measured"
    write_checkpoint(folder)
    progress = {**PROGRESS, "seconds_left": 40.0}
    step = {"method": "bench", "events": [progress] * 3000, "seconds": 0.02}

    @chatting(tmp_path, step, models_dir=[str(tmp_path / "models")])
    async def check(it: Running) -> None:
        def row() -> str:
            return it.screen.status_row.render_line(0).text.strip()

        await it.say("/bench measured")
        await it.until(lambda: row() == "⏸ bench has the memory  ~40 s")
        await it.say("what about it?")
        await it.until(lambda: row() == "⏸ bench has the memory  1 message waits  ~40 s")
        await it.say("and that?")
        await it.until(lambda: "2 messages wait" in row())
        await it.say("/stop")
        await it.until(lambda: len(it.chat.state.turns) == 2)
        await it.idle()
        assert "ready" in row()


# --- results that are kept ---


def kept(it: Running) -> list[tuple[int, str]]:
    """The reports on the screen, by turn, folded ones as their one line."""
    look = it.screen.transcript._look
    reports = [one for one in it.screen.transcript.blocks if isinstance(one, Reported)]
    lines = [["".join(span.text for span in line.spans) for line in one.lines(look)] for one in reports]
    return [(one.turn, "\n".join(text)) for one, text in zip(reports, lines, strict=True)]


def test_results_come_back_folded_with_their_conversation(tmp_path: Path):
    """Those of jobs and of /show, each behind its turn; none is part of a prompt."""
    places = models_here(tmp_path, "measured")
    path = tmp_path / "conversations.db"
    talk(Store(path), "first", "an answer")  # the conversation that the scripted engine calls 1

    @chatting(tmp_path, bench_step(tmp_path / "models" / "measured"), store=Store(path), models_dir=places)
    async def check(it: Running) -> None:
        await it.say("/show parameters")
        await it.until(lambda: kept(it))
        await it.ask("one")
        await it.say("/bench measured")
        await it.until(lambda: it.chat.jobs and it.chat.jobs[0].state == "done" and not it.chat.parked)
        await it.idle()
        await it.until(lambda: "25.0" in kept(it)[1][1])
        await it.say("/new")
        await it.until(lambda: it.chat.state.conversation == 2)
        await it.until(lambda: not kept(it))
        await it.say("/open 1")
        await it.until(lambda: len(kept(it)) == 2)
        await it.idle()
        (first, shown), (turn, line) = kept(it)
        assert (first, turn) == (0, 1)
        assert shown.startswith("▸ Parameters") and line.startswith("▸ bench measured · ")
        assert "25.0" not in line
        transcript = it.screen.transcript
        block_ = next(one for one in transcript.blocks if isinstance(one, Reported) and one.turn == 1)
        transcript.fold(block_)
        await it.until(lambda: "25.0 tok/s" in kept(it)[1][1])
        await it.say("/load measured")
        await it.until(lambda: len(it.engine.asked("load")) == 3)
        await it.idle()
        assert len(kept(it)) == 2
        await it.ask("two")
        assert all(
            "25.0" not in str(one["params"]) for one in it.engine.requests() if "bench" not in str(one)
        )
        await it.say("/results")
        await it.until(lambda: "bench measured" in said(it) and "Parameters" in said(it))
        await it.say("/results 2")
        await it.until(lambda: "25.0 tok/s" in said(it))


def test_what_took_long_is_kept_without_a_conversation_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = models_here(tmp_path, "measured")
    store = Store(tmp_path / "conversations.db")
    front = FakeFront()
    stage = ChatStage(tmp_path, bench_step(tmp_path / "models" / "measured"), front=front, store=store)
    stage.chat.settings = stage.chat.settings.replaced("test", models_dir=places)
    monkeypatch.setattr(stage.chat, "hold", lambda _: None)  # an engine without a conversation so far
    stage.play("/bench measured", "/inspect measured")
    (made,) = store.conversations()
    assert made.title == "bench measured" and made.model.name == "fake-4bit"
    (result,) = store.results(made.id)
    assert "25.0 tok/s" in result.text


def test_a_result_that_cannot_be_kept_is_a_note(tmp_path: Path):
    store = Store(tmp_path / "conversations.db")  # lacks the conversation
    front = ChatStage(tmp_path, store=store).play("/show parameters")
    assert front.all("error") == [
        "the result of Parameters · /set NAME VALUE is not kept: there is no conversation 1"
    ]
