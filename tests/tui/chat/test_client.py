"""The front end's end of the pipe, against a scripted engine: calls, batches, cancels, all kinds of death."""

import asyncio
import sys
from pathlib import Path

import pytest

from qchat.core.errors import QchatError
from qchat.core.events import Done, Text
from qchat.core.worker.protocol import Cancelled
from qchat.tui.chat import client as client_module
from qchat.tui.chat.client import EngineClient, EngineDied, EngineError
from tests.run_async import run_async
from tests.tui.fake_engine import FakeEngine

ENDLESS = {"method": "send", "answer": "word " * 1000, "seconds": 0.01}


async def loaded(fake: FakeEngine) -> EngineClient:
    client = fake.client()
    await client.start()
    await client.request("load", model="m")
    return client


def test_a_call_yields_its_events_and_ends_with_its_result(tmp_path: Path):
    async def go():
        client = await loaded(FakeEngine(tmp_path, {"method": "send", "answer": "Paris it is."}))
        call = client.call("send", text="What is the capital of France?")
        events = [event async for batch in call for event in batch]
        result = await call.result()
        await client.stop()
        return events, result

    events, result = run_async(go())
    assert "".join(event.text for event in events if isinstance(event, Text)) == "Paris it is."
    assert isinstance(events[-1], Done)
    assert result.state.turns[0].answer == "Paris it is."


def test_calls_of_one_client_keep_their_events_apart(tmp_path: Path):
    async def go():
        client = await loaded(FakeEngine(tmp_path, {"method": "send", "answer": "one two"}))
        first, second = client.call("send", text="a"), client.call("count", text="b c d")
        assert (await second.result()).tokens == 3
        assert [b async for b in second] == []
        assert len([b async for b in first]) > 3
        await client.stop()

    run_async(go())


def test_an_error_carries_its_kind_and_exit_code(tmp_path: Path):
    step = {
        "method": "load",
        "error": {"kind": "WeightsError", "message": "a shard is cut off", "exit_code": 3},
    }

    async def go():
        client = FakeEngine(tmp_path, step).client()
        await client.start()
        with pytest.raises(EngineError, match="a shard is cut off") as caught:
            await client.request("load", model="m")
        await client.stop()
        return caught.value

    error = run_async(go())
    assert (error.kind, error.exit_code) == ("WeightsError", 3)


def test_a_cancelled_reply_ends_with_what_was_said(tmp_path: Path):
    async def go():
        client = await loaded(FakeEngine(tmp_path, ENDLESS))
        call = client.call("send", text="go")
        done = None
        async for batch in call:
            for event in batch:
                if isinstance(event, Text):
                    call.cancel()
                done = event if isinstance(event, Done) else done
        await client.stop()
        return done

    done = run_async(go())
    assert done is not None
    assert done.finish_reason == "cancelled"
    assert done.text.startswith("word")


def test_a_cancelled_job_raises_cancelled(tmp_path: Path):
    events = [{"event": "progress", "done": n, "total": 1000} for n in range(1000)]

    async def go():
        client = FakeEngine(tmp_path, {"method": "calibrate", "events": events, "seconds": 0.01}).client()
        await client.start()
        call = client.call("calibrate", model="m", output="o")
        async for _ in call:
            call.cancel()
        with pytest.raises(Cancelled):
            await call.result()
        await client.stop()

    run_async(go())


def test_an_engine_that_is_only_starting_can_be_stopped(tmp_path: Path):
    async def go():
        client = FakeEngine(tmp_path).client()
        starting = asyncio.create_task(client.start())
        await asyncio.sleep(0)
        assert client.pid
        await client.stop()
        with pytest.raises(EngineDied):
            await starting
        assert not client.alive

    run_async(go())


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({"die": "SIGKILL"}, "SIGKILL"),
        ({"die": "SIGSEGV", "last_words": "fatal: bad access"}, "SIGSEGV: fatal: bad access"),
        ({"die": 3, "last_words": "MemoryError"}, "exit code 3: MemoryError"),
    ],
)
def test_a_death_ends_every_call_and_is_told_in_one_sentence(tmp_path: Path, step: dict, told: str):
    async def go():
        client = await loaded(FakeEngine(tmp_path, {"method": "send", "answer": "so far", **step}))
        deaths: list[str] = []
        client.on_death = deaths.append
        calls = client.call("send", text="a"), client.call("state")
        text = [e.text async for batch in calls[0] for e in batch if isinstance(e, Text)]
        for call in calls:
            with pytest.raises(EngineDied, match=told.split(":")[0]):
                await call.result()
        with pytest.raises(EngineDied):
            client.call("state")
        assert not client.alive
        await client.stop()
        return text, deaths

    text, deaths = run_async(go())
    assert "".join(text) == "so far"
    assert len(deaths) == 1
    assert told in deaths[0]
    assert "\n" not in deaths[0]


def test_an_engine_that_was_stopped_has_not_died(tmp_path: Path):
    async def go():
        client = await loaded(FakeEngine(tmp_path))
        deaths: list[str] = []
        client.on_death = deaths.append
        await client.stop()
        await client.stop()
        return deaths

    assert run_async(go()) == []


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("print('hello')", "no message"),
        ("print('x' * 1000)", "no message"),
        ("print('[' * 100000)", "no message"),
        ("import sys; sys.exit('no such library')", "no such library"),
        ('print(\'{"event": "ready", "protocol": 99}\')', "protocol 99"),
    ],
)
def test_a_process_that_is_no_engine_is_refused_in_one_sentence(script: str, told: str):
    async def go():
        client = EngineClient([sys.executable, "-c", script])
        with pytest.raises(EngineDied, match=told):
            await client.start()
        await client.stop()

    run_async(go())


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({"result": {}}, r"result of state: .*required field `state`"),
        ({"result": {"state": {"turns": "none"}}}, "result of state: "),
        ({"result": []}, "result of state: "),
        ({"events": [{"event": "text"}]}, r"event text: .*required field `text`"),
        ({"events": [{"event": "song", "text": "la"}]}, "there is no event 'song'"),
        ({"events": [{"text": "la"}]}, "there is no event None"),
        ({"error": {"kind": "ModelError", "message": 5}}, "error: "),
    ],
)
def test_a_message_of_another_form_ends_the_engine_in_one_sentence(tmp_path: Path, step: dict, told: str):
    async def go():
        client = await loaded(FakeEngine(tmp_path, {"method": "state", **step}))
        deaths: list[str] = []
        client.on_death = deaths.append
        with pytest.raises(EngineDied, match=f"no message.*{told}"):
            await client.request("state")
        await client.stop()
        return deaths

    (death,) = run_async(go())
    assert "\n" not in death


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_module, "MAX_LINE_NBYTES", 1 << 16)
    script = "import sys\nwhile True: sys.stdout.write('x' * 9999)"

    async def go():
        client = EngineClient([sys.executable, "-c", script])
        with pytest.raises(EngineDied, match="no message"):
            await client.start()
        await client.stop()

    run_async(go())


def test_a_command_that_does_not_exist_is_refused():
    async def go():
        await EngineClient(["/nowhere/engine"]).start()

    with pytest.raises(EngineDied, match="could not be started"):
        run_async(go())


def test_a_client_that_was_not_started_refuses_calls():
    async def go():
        EngineClient().call("state")

    with pytest.raises(QchatError, match="not running"):
        run_async(go())


def test_texts_of_any_kind_survive_the_pipe(tmp_path: Path):
    text = 'a "quoted" \\ line\n\x1b[2J\u2028 é 漢字 👩‍👩‍👧 \x00 ' + "x" * 200_000

    async def go():
        fake = FakeEngine(tmp_path)
        client = await loaded(fake)
        await client.request("rename", title=text)
        title = (await client.request("state")).state.title
        await client.stop()
        return title

    assert run_async(go()) == text


def test_half_a_surrogate_pair_does_not_break_the_pipe(tmp_path: Path):
    async def go():
        client = await loaded(FakeEngine(tmp_path))
        tokens = (await client.request("count", text="a \ud800 b")).tokens
        await client.stop()
        return tokens

    assert run_async(go()) == 3


def test_the_engine_finds_modules_where_the_front_end_does(tmp_path: Path):
    """Also where it was started from a folder that holds modules of the same names."""
    (tmp_path / "qchat").mkdir()
    (tmp_path / "qchat" / "__init__.py").write_text("raise SystemExit('planted')")

    async def go():
        client = FakeEngine(tmp_path).client()
        await client.start()
        await client.stop()

    run_async(go())
