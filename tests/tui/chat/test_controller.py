"""The controller against a scripted engine: what a view is told, what waits, and what a death costs."""

import asyncio
import base64
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from qchat.core.errors import QchatError, UsageError
from qchat.tui.chat.client import EngineDied, EngineError
from qchat.tui.text.report import Lines, Report
from tests.tui.chat_stage import ChatStage, render
from tests.tui.fake_front import FakeFront

SLOW = {"method": "send", "thought": "hm " * 300, "answer": "word " * 300, "seconds": 0.01}
PROGRESS = [{"event": "progress", "done": n, "total": 500, "unit": "bytes"} for n in range(500)]


def test_a_question_is_shown_answered_and_kept(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "send", "thought": "A capital.", "answer": "Paris."})

    async def scene(stage: ChatStage) -> None:
        await stage.chat.send("Capital of France?")
        assert stage.front.text == "Paris."
        turn = stage.chat.state.turns[0]
        assert (turn.thinking, turn.answer) == ("A capital.", "Paris.")

    stage.play(scene)
    assert stage.front.calls == [("question", "Capital of France?"), ("finished", ("stop", "Paris."))]
    assert stage.front.phases == ["starting", "loading", "idle", "reading", "thinking", "answering", "idle"]


def test_the_settings_in_force_go_with_every_reply_and_single_ones_stand_over_them(tmp_path: Path):
    stage = ChatStage(tmp_path)

    async def scene(stage: ChatStage) -> None:
        stage.chat.settings.change("temperature", 0.5, "test")
        await stage.chat.send("a")
        await stage.chat.retry(temperature=1.5)

    stage.play(scene)
    assert stage.fake.asked("send")[0]["settings"]["temperature"] == 0.5
    assert stage.fake.asked("retry")[0]["settings"]["temperature"] == 1.5


def test_what_is_sent_while_the_model_loads_or_answers_waits_and_is_sent_in_order(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "load", "events": [], "seconds": 0.0})

    async def scene(stage: ChatStage) -> None:
        loading = asyncio.create_task(stage.chat.load("/models/a"))
        await asyncio.sleep(0)
        for text in ("one", "two", "three"):
            await stage.chat.send(text)
        assert stage.chat.queue == ["one", "two", "three"]
        await loading
        await stage.until(lambda: len(stage.front.all("finished")) == 3)

    stage.play(scene, load="")
    assert stage.front.all("question") == ["one", "two", "three"]
    assert stage.chat.queue == []


def test_a_queued_question_that_is_refused_does_not_stop_those_behind_it(tmp_path: Path):
    refusal = {
        "method": "send",
        "error": {"kind": "ContextLengthExceeded", "message": "too long", "exit_code": 4},
    }
    stage = ChatStage(tmp_path, {"method": "send"}, refusal, {"method": "send"})

    async def scene(stage: ChatStage) -> None:
        first = asyncio.create_task(stage.chat.send("one"))
        await asyncio.sleep(0)
        await stage.chat.send("two")
        await stage.chat.send("three")
        await first
        await stage.until(lambda: len(stage.front.all("finished")) == 2)

    stage.play(scene)
    assert stage.front.notes == [("error", "too long")]
    assert stage.front.all("returned") == ["two"]


def test_stop_ends_a_reply_and_keeps_what_was_said(tmp_path: Path):
    stage = ChatStage(tmp_path, SLOW)

    async def scene(stage: ChatStage) -> None:
        reply = asyncio.create_task(stage.chat.send("go"))
        await stage.until(lambda: "thinking" in stage.front.phases)
        stage.chat.stop()
        await reply

    stage.play(scene)
    assert stage.front.all("finished")[0][0] == "cancelled"
    assert stage.chat.state.turns[0].thinking.startswith("hm")


def test_a_question_stopped_before_any_answer_comes_back(tmp_path: Path):
    events = [{"event": "prefill", "done": n, "total": 1000, "cached": 0} for n in range(1000)]
    stage = ChatStage(tmp_path, {"method": "send", "events": events, "seconds": 0.01})

    async def scene(stage: ChatStage) -> None:
        reply = asyncio.create_task(stage.chat.send("go"))
        await stage.until(lambda: "reading" in stage.front.phases and stage.chat.status.done > 3)
        stage.chat.stop()
        await reply

    stage.play(scene)
    assert stage.front.calls == [("question", "go"), ("rebuilt", []), ("returned", "go")]


def test_closing_a_thought_goes_on_to_the_answer(tmp_path: Path):
    stage = ChatStage(tmp_path, {**SLOW, "answer": "Done."})

    async def scene(stage: ChatStage) -> None:
        reply = asyncio.create_task(stage.chat.send("go"))
        await stage.until(lambda: "thinking" in stage.front.phases)
        await stage.chat.close_thought()
        await reply

    stage.play(scene)
    assert stage.front.all("finished") == [("stop", "Done.")]
    assert len(stage.chat.state.turns[0].thinking) < len(SLOW["thought"])


def test_retry_and_edit_show_the_conversation_up_to_where_they_begin(tmp_path: Path):
    stage = ChatStage(tmp_path)

    async def scene(stage: ChatStage) -> None:
        await stage.chat.send("one")
        await stage.chat.send("two")
        await stage.chat.retry()
        assert len(stage.chat.state.turns[1].siblings) == 2
        await stage.chat.edit(1, "uno")
        stage.front.calls.append(("turns", [turn.question for turn in stage.chat.state.turns]))

    stage.play(scene)
    assert stage.front.all("rebuilt") == [["one"], []]
    assert stage.front.all("question") == ["one", "two", "two", "uno"]
    assert stage.front.all("turns") == [["uno"]]


def test_moving_in_the_conversation_draws_it_anew(tmp_path: Path):
    stage = ChatStage(tmp_path)

    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        for text in ("one", "two", "three"):
            await chat.send(text)
        assert await chat.undo() == "three"
        await chat.fork(1)
        await chat.switch(chat.state.branches[0].number)
        await chat.new()
        await chat.open(1)

    stage.play(scene)
    assert stage.front.all("rebuilt") == [
        ["one", "two"],
        ["one"],
        ["one", "two", "three"],
        [],
        ["one", "two", "three"],
    ]


def test_what_does_not_go_is_refused_in_a_sentence(tmp_path: Path):
    stage = ChatStage(tmp_path, SLOW)

    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        for doing in (chat.retry(), chat.edit(1, "x"), chat.undo(), chat.switch(99)):
            with pytest.raises(QchatError, match="there is no"):
                await doing
        reply = asyncio.create_task(chat.send("go"))
        await stage.until(lambda: chat.busy)
        for doing in (chat.undo(), chat.new(), chat.load("/models/b")):
            with pytest.raises(UsageError, match="running"):
                await doing
        chat.stop()
        await reply

    stage.play(scene)


def test_without_a_model_questions_are_refused(tmp_path: Path):
    async def scene(stage: ChatStage) -> None:
        stage.chat.meter.end("idle")
        with pytest.raises(UsageError, match="no model is loaded"):
            await stage.chat.send("go")

    ChatStage(tmp_path).play(scene, load="")


@pytest.mark.parametrize("stored", [True, False])
def test_another_model_goes_on_with_the_conversation(tmp_path: Path, stored: bool):
    """From the store where there is one, else from the messages."""
    store = SimpleNamespace(path=tmp_path / "store.db", results=lambda _: []) if stored else None
    stage = ChatStage(tmp_path, {"method": "send", "thought": "hm", "answer": "Yes."}, store=store)

    async def scene(stage: ChatStage) -> None:
        await stage.chat.send("one")
        await stage.chat.load("/models/b")

    stage.play(scene)
    load = stage.fake.asked("load")[1]
    assert load["model"] == "/models/b"
    if stored:
        assert (load["conversation"], load["store"]) == (1, str(tmp_path / "store.db"))
        assert stage.fake.asked("prime") == []
    else:
        assert stage.fake.asked("prime")[0]["messages"] == [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"},
        ]


@pytest.mark.parametrize("kind", ["seen", "gone", "refused"])
def test_another_engine_sees_the_pictures_again_or_the_text_alone(tmp_path: Path, kind: str):
    """As after a death without a store: the files are read anew, if they are there and the model sees."""
    blind = {"method": "prime", "error": {"kind": "UsageError", "message": "this model sees no pictures"}}
    stage = ChatStage(tmp_path, *([blind, {"method": "prime"}] if kind == "refused" else []))
    path = tmp_path / "red.png"
    path.write_bytes(b"picture")

    async def scene(stage: ChatStage) -> None:
        stage.chat.pictures["what is @red.png?"] = [str(path)]
        await stage.chat.send("what is @red.png?")
        if kind == "gone":
            path.unlink()
        await stage.chat.load("/models/b")

    stage.play(scene)
    first, *others = [asked["messages"][0]["content"] for asked in stage.fake.asked("prime")]
    url = f"data:image/*;base64,{base64.b64encode(b'picture').decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is @red.png?"}]
    wanted = {"seen": (parts, []), "gone": (parts[1]["text"], []), "refused": (parts, [parts[1]["text"]])}
    assert (first, others) == wanted[kind]
    told = [text for _, text in stage.front.notes if "goes on without its pictures" in text]
    assert len(told) == (kind != "seen")


def test_a_turn_in_which_the_engine_dies_keeps_its_pictures(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "send", "answer": "One two three", "die": "SIGKILL"})
    path = tmp_path / "red.png"
    Image.new("RGB", (20, 10)).save(path)

    async def scene(stage: ChatStage) -> None:
        stage.chat.pictures["what is @red.png?"] = [str(path)]
        with suppress(EngineDied):
            await stage.chat.send("what is @red.png?")

    stage.play(scene)
    assert stage.front.all("pictures") == [["red.png"]]
    (turn,) = stage.chat.state.turns
    assert [(one.name, one.width, one.tokens) for one in turn.pictures] == [("red.png", 20, 0)]


def test_a_model_that_cannot_be_loaded_leaves_the_chat_as_it_was(tmp_path: Path):
    bad = {"method": "load", "error": {"kind": "ModelError", "message": "no model there", "exit_code": 3}}
    stage = ChatStage(tmp_path, {"method": "load"}, {**bad, "events": []}, {"method": "load"})

    async def scene(stage: ChatStage) -> None:
        await stage.chat.send("one")
        with pytest.raises(EngineError, match="no model there"):
            await stage.chat.load("/models/b")
        await stage.chat.send("two")

    stage.play(scene, load="/models/a")
    assert stage.chat.model is not None
    assert stage.chat.model.path == "/models/a"
    assert len(stage.chat.state.turns) == 2


@pytest.mark.parametrize("said", [True, False])
def test_a_death_keeps_everything_and_restart_goes_on(tmp_path: Path, said: bool):
    """A half answer stays; a question without any answer is asked again."""
    events = [{"event": "text", "text": "half an", "tokens": 2}] if said else []
    dying = {"method": "send", "events": events, "die": "SIGKILL"}
    stage = ChatStage(tmp_path, {"method": "send", "answer": "Yes."}, dying)

    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        await chat.send("one")
        with pytest.raises(EngineDied):
            await chat.send("two")
        assert chat.status.phase == "dead"
        assert "SIGKILL" in chat.status.reason
        assert [turn.question for turn in chat.state.turns] == ["one", "two"]
        await chat.send("three")
        assert chat.queue == ["three"]
        with pytest.raises(UsageError, match="restart"):
            await chat.undo()
        stage.fake.write({"method": "send", "answer": "Again."})
        await chat.restart(context_limit=1024)
        await stage.until(lambda: ("finished", ("stop", "Again.")) in stage.front.calls and not chat.queue)
        await stage.until(lambda: not chat.busy)

    stage.play(scene)
    assert [kind for kind, _ in stage.front.notes] == ["error"]
    assert stage.fake.asked("load")[1]["context_limit"] == 1024
    answers = [(turn.question, turn.answer) for turn in stage.chat.state.turns]
    second = ("two", "half an" if said else "Again.")
    assert answers == [("one", "Yes."), second, ("three", "Again.")]


def test_a_restart_right_after_a_death_waits_for_what_the_death_ends(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "send", "die": "SIGKILL"})

    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        with pytest.raises(EngineDied):
            await chat.send("one")
        chat._busy = True  # as until the reply has heard of it
        restart = asyncio.create_task(chat.restart())
        await asyncio.sleep(0)
        assert not restart.done()
        chat._busy = False
        await restart
        assert chat.status.phase == "idle"

    stage.play(scene)


def test_what_was_shown_of_an_answer_stays_though_the_store_has_less(tmp_path: Path):
    events = [
        {"event": "thought", "text": "hm", "tokens": 1},
        {"event": "text", "text": "half an", "tokens": 2},
    ]
    store = SimpleNamespace(path=tmp_path / "store.db", results=lambda _: [])
    stage = ChatStage(tmp_path, {"method": "send", "events": events, "die": "SIGKILL"}, store=store)

    async def scene(stage: ChatStage) -> None:
        with pytest.raises(EngineDied):
            await stage.chat.send("two")
        await stage.chat.restart()

    stage.play(scene)
    assert stage.fake.asked("prime")[0]["messages"][1] == {
        "role": "assistant",
        "content": "half an",
        "reasoning_content": "hm",
    }
    assert [(turn.question, turn.answer) for turn in stage.chat.state.turns] == [("two", "half an")]


def test_a_death_while_loading_is_told_and_can_be_restarted(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "load", "die": 1, "last_words": "std::bad_alloc"})

    async def scene(stage: ChatStage) -> None:
        with pytest.raises(EngineDied, match="bad_alloc"):
            await stage.chat.load("/models/a")
        assert stage.chat.status.phase == "dead"
        stage.fake.write()
        await stage.chat.restart()
        assert stage.chat.status.phase == "idle"

    stage.play(scene, load="")


def test_an_idle_engine_that_dies_is_noticed(tmp_path: Path):
    async def scene(stage: ChatStage) -> None:
        assert stage.chat.client is not None
        stage.chat.client.kill()
        await stage.until(lambda: stage.chat.status.phase == "dead")

    stage = ChatStage(tmp_path)
    stage.play(scene)
    assert "SIGKILL" in stage.front.notes[0][1]


def test_a_job_runs_beside_the_chat_and_ends_in_a_report(tmp_path: Path):
    events = [*PROGRESS[:3], {"event": "row", "name": "a"}, {"event": "row", "name": "b"}]
    stage = ChatStage(tmp_path, {"method": "eval", "events": events, "result": {"overall": 1}})

    async def scene(stage: ChatStage) -> None:
        job = stage.chat.start_job("eval", "eval", {"models": ["m"]}, render)
        assert not stage.chat.busy
        await stage.chat.send("meanwhile")
        await job.ended()
        assert job.report() == Report("job", (Lines(["3", "{'overall': 1}"]),))

    stage.play(scene)
    assert stage.front.all("job ended") == ["done"]
    assert stage.front.all("finished") == [("stop", "Yes.")]


def test_stop_cancels_the_newest_job_when_nothing_else_runs(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "convert", "events": PROGRESS, "seconds": 0.01})

    async def scene(stage: ChatStage) -> None:
        jobs = [
            stage.chat.start_job("convert", "convert", {"source": "a", "target": name}, render)
            for name in "bc"
        ]
        await stage.until(lambda: all(job.events for job in jobs))
        stage.chat.stop()
        await jobs[1].ended()
        assert [job.state for job in jobs] == ["running", "cancelled"]
        await stage.chat.quit()

    stage.play(scene)


def test_a_job_whose_engine_dies_fails_alone(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "convert", "events": PROGRESS[:2], "die": "SIGKILL"})

    async def scene(stage: ChatStage) -> None:
        job = stage.chat.start_job("convert", "convert", {"source": "a", "target": "b"}, render)
        await job.ended()
        assert job.state == "failed"
        assert "SIGKILL" in job.error
        await stage.chat.send("still here?")

    stage.play(scene)
    assert stage.front.all("finished") == [("stop", "Yes.")]


def test_a_job_that_wants_the_machine_alone_has_the_model_unloaded_meanwhile(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "eval", "events": PROGRESS[:20], "seconds": 0.01})

    async def scene(stage: ChatStage) -> None:
        job = stage.chat.start_job("eval", "eval", {"models": ["m"]}, render, alone=True)
        await asyncio.sleep(0.05)
        await stage.chat.send("later")
        assert stage.chat.queue == ["later"]
        await job.ended()
        await stage.until(lambda: stage.front.all("finished"))

    stage.play(scene)
    assert [request["method"] for request in stage.fake.requests()][:4] == ["load", "unload", "eval", "load"]


def test_jobs_that_want_the_machine_alone_take_turns_and_the_last_brings_the_model_back(tmp_path: Path):
    eval_ = {"method": "eval", "events": PROGRESS[:20], "seconds": 0.01}
    stage = ChatStage(tmp_path, eval_, {"method": "inspect", "result": {}}, eval_)

    async def scene(stage: ChatStage) -> None:
        start = stage.chat.start_job
        jobs = [start("eval", "eval", {"models": [name]}, render, alone=True) for name in "ab"]
        await stage.until(lambda: jobs[0].events)
        beside = start("inspect", "inspect", {"model": "m"}, render)
        await beside.ended()
        assert stage.chat.parked and stage.chat.busy
        await jobs[0].ended()
        assert stage.chat.parked and jobs[1].state == "running"
        await jobs[1].ended()
        await stage.until(lambda: stage.chat.model is not None and not stage.chat.busy)

    stage.play(scene)
    asked = [request["method"] for request in stage.fake.requests()]
    assert asked[:2] == ["load", "unload"] and asked.count("eval") == 2
    assert asked.index("load", 1) > max(place for place, method in enumerate(asked) if method == "eval")


def test_quitting_ends_the_engine_and_the_jobs(tmp_path: Path):
    async def scene(stage: ChatStage) -> None:
        stage.chat.start_job("convert", "convert", {"source": "a", "target": "b"}, render)
        await asyncio.sleep(0.1)
        reply = asyncio.create_task(stage.chat.send("go"))
        await asyncio.sleep(0.1)
        await stage.chat.quit()
        await reply

    stage = ChatStage(tmp_path, SLOW, {"method": "convert", "events": PROGRESS, "seconds": 0.01})
    stage.play(scene)
    assert stage.chat.client is not None and not stage.chat.client.alive
    assert stage.fake.asked("save_state") == [{}]
    assert stage.front.notes == []
    assert stage.front.all("finished")[0][0] == "cancelled"


def test_a_chat_goes_from_one_front_end_to_another_with_its_engine_its_queue_and_its_jobs(tmp_path: Path):
    slow = {"method": "eval", "events": PROGRESS[:20], "seconds": 0.02}
    stage = ChatStage(tmp_path, {"method": "send", "answer": "Yes."}, slow)
    other = FakeFront()

    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        await chat.send("one")
        job = chat.start_job("eval", "eval", {"models": ["m"]}, render)
        engine = chat.connected().pid
        chat.leave_view()
        chat.line_up("two")
        before = len(stage.front.calls)
        assert chat.show_in(other) is chat
        await asyncio.sleep(0.05)
        assert chat.queue == ["two"] and not other.calls
        chat.take_over()
        assert other.calls[:2] == [("rebuilt", ["one"]), ("job", "eval")]
        await stage.until(lambda: other.all("finished"))
        await job.ended()
        assert len(stage.front.calls) == before and chat.connected().pid == engine

    stage.play(scene)
    assert other.all("question") == ["two"] and other.all("job ended") == ["done"]
    assert len(stage.fake.asked("load")) == 1
