"""`/serve`: a server beside the chat, on the chat's engine, asked over loopback."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from qchat.tui.commands import perform
from qchat.tui.screens.serve import ServeScreen
from tests.tui.chat_stage import ChatStage
from tests.tui.fake_engine import completion_events
from tests.tui.running_app import ENDLESS, Running, chatting, quick_keys

__all__ = ["quick_keys"]

BODY = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"
ANSWER = {"method": "complete", "events": completion_events("Hello there")}
SLOWLY = {"method": "complete", "events": completion_events("word " * 3000), "seconds": 0.02}


@asynccontextmanager
async def asking(chat: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the chat's server."""
    async with httpx2.AsyncClient(base_url=chat.server.url, timeout=60) as client:
        yield client


# --- in the app ---


@pytest.mark.usefixtures("quick_keys")
def test_a_request_is_answered_shown_and_listed_beside_the_chat(tmp_path: Path):
    @chatting(tmp_path, SLOWLY, size=(120, 30))
    async def check(it: Running) -> None:
        await it.say("/serve --port 0")
        await it.until(lambda: it.chat.server is not None)
        server: Any = it.chat.server
        assert it.said[-1] == ("info", server.greeting)
        assert f"fake answers at {server.url}/v1" in server.greeting
        row = lambda: it.screen.status_row.render_line(0).text  # noqa: E731
        await it.until(lambda: "⇅ serving" in row())
        async with asking(it.chat) as client:
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "fake"
            request = asyncio.create_task(client.post(CHAT, json=BODY, headers={"user-agent": "editor/1"}))
            await it.until(lambda: "serving 1 request at" in row())
            await it.say("/serve")
            await it.until(
                lambda: isinstance(it.app.screen, ServeScreen) and it.app.screen.query("#sheet-report")
            )
            shown = lambda: str(it.app.screen.query_one("#sheet-report").render())  # noqa: E731
            await it.until(lambda: "editor/1" in shown() and "answering" in shown())
            request.cancel()
            await asyncio.wait({request})
            await it.until(lambda: "unfinished" in shown())
            await it.pilot.press("escape")
            await it.until(lambda: it.app.screen is it.screen)
            await it.say("/serve stop")
            await it.until(lambda: it.said[-1][1] == f"{server.url} is no longer served")
            await it.until(lambda: "serving" not in row())
            with pytest.raises(httpx2.ConnectError):
                await client.get("/v1/models")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_keys")
def test_leaving_the_app_ends_the_server_and_its_requests(tmp_path: Path):
    @chatting(tmp_path, SLOWLY)
    async def check(it: Running) -> None:
        await it.say("/serve --port 0")
        await it.until(lambda: it.chat.server is not None)
        server: Any = it.chat.server
        async with asking(it.chat) as client:
            request = asyncio.create_task(client.post(CHAT, json=BODY))
            await it.until(lambda: it.engine.asked("complete"))
            await it.app._leave("shell")
            assert server._running.done()
            await asyncio.wait({request})
            assert request.exception() or request.result().status_code >= 500


# --- turns ---


@pytest.mark.slow
def test_a_request_and_the_chats_reply_take_turns(tmp_path: Path):
    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        await perform("/serve --port 0", chat, stage.front)
        async with asking(chat) as client:
            reply = asyncio.create_task(chat.send("first"))
            await stage.until(lambda: chat.status.phase == "answering")
            requests = [asyncio.create_task(client.post(CHAT, json=BODY)) for _ in range(2)]
            await stage.until(lambda: len(chat.server._backend.activities) == 2)  # type: ignore
            assert not any(request.done() for request in requests)
            await chat.send("second")  # waits in the chat
            chat.stop()
            await reply
            for request in requests:
                assert (await request).status_code == 200
            await stage.until(lambda: len(chat.state.turns) == 2 and not chat.busy)
        methods = [one["method"] for one in stage.fake.requests() if one["method"] in ("send", "complete")]
        assert methods == ["send", "complete", "send", "complete"]

    ChatStage(tmp_path, ENDLESS, {"method": "send", "answer": "yes"}, ANSWER).play(scene)


# --- what goes wrong, in one sentence each ---


def test_a_taken_port_and_bad_words_are_refused(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        front = ChatStage(tmp_path).play(
            f"/serve --port {port}", "/serve --port x", "/serve it", "/serve stop"
        )
    assert [text for kind, text in front.notes if kind == "error"] == [
        f"cannot listen on 127.0.0.1, port {port}: Address already in use",
        "--port is 'x', wanted a whole number from 0 to 65,535",
        "it is not understood: /serve [stop|--port N]",
        "nothing is served: /serve begins it",
    ]


def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [one for one in sys.modules if one.startswith("qchat.tui.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    front = ChatStage(tmp_path).play("/serve")
    assert front.notes[-1] == ("error", "/serve needs the packages of its extra: pip install 'qchat[serve]'")


def test_without_a_model_nothing_is_served(tmp_path: Path):
    front = ChatStage(tmp_path).play("/serve", load="")
    assert front.notes[-1][1].startswith("no model is loaded")


def test_a_second_serve_lists_the_requests_and_another_port_is_refused(tmp_path: Path):
    front = ChatStage(tmp_path).play("/serve --port 0", "/serve", "/serve --port 0")
    assert "no requests yet" in front.said
    assert "it serves already" in front.notes[-1][1]


def test_another_model_answers_from_then_on_and_none_is_a_503(tmp_path: Path):
    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        await perform("/serve --port 0", chat, stage.front)
        async with asking(chat) as client:
            await chat.lend_memory()
            refused = await client.post(CHAT, json=BODY)
            assert refused.status_code == 503
            assert refused.json()["error"]["message"].startswith("a job has the memory of the model")
            assert refused.headers["retry-after"]
            await chat.take_memory_back()
            (stage.folder / "other").mkdir()
            await perform(f"/load {stage.folder / 'other'}", chat, stage.front)
            assert (await client.post(CHAT, json=BODY)).status_code == 200
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "other"
            assert stage.front.notes[-1][1].startswith("other answers at")

    ChatStage(tmp_path, ANSWER).play(scene)


def test_a_killed_engine_ends_the_stream_with_an_error_and_the_next_request_restarts_it(tmp_path: Path):
    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        await perform("/serve --port 0", chat, stage.front)
        async with asking(chat) as client:
            async with client.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
                assert response.status_code == 200
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith("data:")
                assert chat.client is not None
                os.kill(chat.client.pid, signal.SIGKILL)
                rest = [line async for line in lines]
            assert any("SIGKILL" in line for line in rest)
            await stage.until(lambda: chat.status.phase == "dead")
            stage.fake.write(ANSWER)
            assert (await client.post(CHAT, json=BODY)).status_code == 200
            assert chat.status.phase == "idle"

    ChatStage(tmp_path, SLOWLY).play(scene)
