"""The server's own engine: loaded once, also when it dies, fails to load, or nobody waits any more."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qchat.core.errors import QchatError
from qchat.tui.chat.client import EngineClient
from qchat.tui.serve.engines import OwnEngine
from tests.run_async import run_async
from tests.tui.fake_engine import FakeEngine

LOADS_SLOWLY = {"method": "load", "seconds": 0.3, "events": [{"event": "log", "text": "loading"}]}


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def own_engine(fake: FakeEngine) -> OwnEngine:
    return OwnEngine(fake.client, {"model": "fake"})


def test_a_killed_engine_is_replaced_by_one_with_the_model(tmp_path: Path):
    fake = FakeEngine(tmp_path)

    async def scenario() -> tuple[EngineClient, EngineClient]:
        source = own_engine(fake)
        first = await source.client()
        assert await source.client() is first
        assert source.ready
        os.kill(source.pid, signal.SIGKILL)
        await until(lambda: not first.alive)
        assert not source.ready
        second = await source.client()
        assert second.alive
        assert source.ready
        await source.stop()
        return first, second

    first, second = run_async(scenario())
    assert first is not second
    assert len(fake.asked("load")) == 2


@pytest.mark.parametrize("end", [{"die": "SIGKILL"}, {"error": {"kind": "ModelError", "message": "broken"}}])
def test_after_a_failed_load_the_next_request_loads_again(tmp_path: Path, end: dict[str, object]):
    fake = FakeEngine(tmp_path, {"method": "load", **end})
    clients: list[EngineClient] = []

    def factory() -> EngineClient:
        clients.append(fake.client())
        return clients[-1]

    async def scenario() -> None:
        source = OwnEngine(factory, {"model": "fake"})
        with pytest.raises(QchatError):
            await source.client()
        assert source.model is None
        assert not clients[0].alive
        fake.write()
        client = await source.client()
        assert client is clients[1]
        assert source.model is not None
        await source.stop()

    run_async(scenario())


def test_a_client_that_leaves_while_the_model_loads_does_not_stop_the_load(tmp_path: Path):
    fake = FakeEngine(tmp_path, LOADS_SLOWLY)

    async def scenario() -> None:
        source = own_engine(fake)
        leaving = asyncio.create_task(source.client())
        await until(lambda: bool(fake.asked("load")))
        leaving.cancel()
        await asyncio.wait({leaving})
        clients = await asyncio.gather(source.client(), source.client())
        assert clients[0] is clients[1]
        assert source.model is not None
        await source.stop()

    run_async(scenario())
    assert len(fake.asked("load")) == 1


def test_an_engine_that_loads_is_ended_at_once(tmp_path: Path):
    fake = FakeEngine(tmp_path, {**LOADS_SLOWLY, "seconds": 3600})

    async def scenario() -> None:
        source = own_engine(fake)
        waiting = asyncio.create_task(source.client())
        await until(lambda: bool(fake.asked("load")))
        await source.stop()
        await asyncio.wait({waiting})
        assert waiting.cancelled()

    run_async(scenario())
    assert not fake.asked("save_state")


def test_an_engine_that_saves_for_long_can_be_killed(tmp_path: Path):
    fake = FakeEngine(tmp_path, {**LOADS_SLOWLY, "method": "save_state", "seconds": 3600})

    async def scenario() -> None:
        source = own_engine(fake)
        await source.client()
        stopping = asyncio.create_task(source.stop())
        await until(lambda: bool(fake.asked("save_state")))
        source.kill()
        await stopping

    run_async(scenario())
