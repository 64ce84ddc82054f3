"""The app under test: on a scripted engine, with a history in memory, and ways to wait for what it does."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from qchat.core import Store
from qchat.tui.chat.controller import Chat
from qchat.tui.chat.start import Beginning
from qchat.tui.screens.app import QchatApp
from qchat.tui.user.history import History
from qchat.tui.user.keymap import Keymap
from qchat.tui.user.settings import Settings
from tests.run_async import run_async
from tests.tui.fake_engine import FakeEngine

PATIENCE_SECONDS = 60.0
PLAY_SECONDS = 300.0  # longer, so that a wait in vain is reported by what it waited for
# slow enough to be caught in the act, and long
ENDLESS = {"method": "send", "thought": "hm " * 20, "answer": "word " * 500, "seconds": 0.02}


@pytest.fixture
def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys follow each other at once; the pilot waits until this process has nothing to do after each."""

    async def at_once(*_: float) -> None:
        await asyncio.sleep(0)

    for module in ("textual.app", "textual.pilot"):
        monkeypatch.setattr(f"{module}.wait_for_idle", at_once)


class Running:
    """The app with its pilot and engine; `said` are the notes, newest last."""

    def __init__(self, app: QchatApp, pilot: Pilot[Any], engine: FakeEngine):
        self.app, self.pilot, self.engine = app, pilot, engine
        self.screen = app.chat_screen
        self.chat, self.prompt, self.front = self.screen.chat, self.screen.prompt, self.screen.front
        self.said: list[tuple[str, str]] = []
        note = self.front.note

        def noting(text: str, kind: Any = "info") -> None:
            self.said.append((kind, text))
            note(text, kind)

        self.front.note = noting

    @property
    def phase(self) -> str:
        return self.chat.status.phase

    @property
    def keys(self) -> str:
        return self.screen.keybar.render_line(0).text

    async def until(self, true: Callable[[], Any]) -> None:
        """Wait for what must come; a test that waits in vain fails."""
        end = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while not true():
            assert asyncio.get_running_loop().time() < end, f"in vain, {self.phase}, {self.said}"
            await asyncio.sleep(0.01)

    async def idle(self) -> None:
        await self.until(lambda: self.phase == "idle" and not self.chat.busy and not self.chat.queue)

    def is_at_rest(self) -> bool:
        """Nothing that was typed is still being done, jobs aside."""
        return not self.chat.busy and all(worker.is_finished for worker in self.app.workers)

    async def say(self, text: str) -> None:
        """Type `text` and press enter."""
        self.prompt.put(text)
        await self.pilot.press("enter")

    async def ask(self, text: str) -> None:
        """Say it and wait for the answer."""
        turns = len(self.chat.state.turns)
        await self.say(text)
        await self.until(lambda: len(self.chat.state.turns) > turns)
        await self.idle()


@asynccontextmanager
async def running(
    folder: Path,
    *steps: dict[str, Any],
    size: tuple[int, int] = (100, 30),
    text: str = "",
    stats: bool = False,
    keys: dict[str, Any] | None = None,
    history: History | None = None,
    store: Store | None = None,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> AsyncIterator[Running]:
    engine = FakeEngine(folder, *steps)
    options = Settings.load({"theme": "night", **settings})
    app = QchatApp(
        lambda view: Chat(view, engine.client, settings=options, store=store, clock=clock),
        settings=options,
        keymap=Keymap.load(keys or {}, "config.toml"),
        history=history or History(),
        beginning=Beginning("/models/fake", text=text, stats=stats),
    )
    async with app.run_test(size=size) as pilot:
        run = Running(app, pilot, engine)
        try:
            yield run
        finally:
            await app.chat.quit()


def chatting(
    folder: Path, *steps: dict[str, Any], **options: Any
) -> Callable[[Callable[[Running], Awaitable[None]]], None]:
    """Run the decorated check in an app whose model is loaded."""

    def run(check: Callable[[Running], Awaitable[None]]) -> None:
        async def main() -> None:
            async with running(folder, *steps, **options) as it:
                await it.idle()
                await check(it)

        run_async(main(), PLAY_SECONDS)

    return run
