"""A chat with a front end that records, and a scripted engine or the real one, for the time of one scene."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from qchat.tui.chat.client import EngineClient
from qchat.tui.chat.controller import Chat
from qchat.tui.commands import perform
from qchat.tui.text.report import Lines, Report
from qchat.tui.user.settings import Settings
from tests.run_async import run_async
from tests.tui.fake_engine import FakeEngine
from tests.tui.fake_front import FakeFront

MODEL = "/models/fake-4bit"


class ChatStage:
    """A chat with the front end `front` and the scripted engine `fake`, or a real one."""

    def __init__(
        self,
        folder: Path,
        *steps: dict[str, Any],
        front: FakeFront | None = None,
        store: Any = None,
        real: bool = False,
    ):
        self.folder = folder
        self.fake = FakeEngine(folder, *steps)
        self.front = front or FakeFront()
        factory = EngineClient if real else self.fake.client
        options = Settings().replaced("test", models_dir=[str(folder / "models")])
        self.chat = Chat(self.front, factory, settings=options, store=store)

    def play(self, *scenes: str | Callable[["ChatStage"], Awaitable[None]], load: str = MODEL) -> FakeFront:
        """Load the model, unless `load` is empty; submit the lines and await the scenes, in order; quit."""
        run_async(self._play(*scenes, load=load))
        self.front.check_widths()
        return self.front

    async def _play(self, *scenes: str | Callable[["ChatStage"], Awaitable[None]], load: str) -> None:
        try:
            if load:
                await self.chat.load(load)
                self.front.calls.clear()
            for scene in scenes:
                await (perform(scene, self.chat, self.front) if isinstance(scene, str) else scene(self))
            for job in self.chat.jobs:
                await job.ended()
        finally:
            await self.chat.quit()

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            await asyncio.sleep(0.005)


async def at_rest(stage: ChatStage) -> None:
    """Wait until every job has ended and the chat has its model again."""
    for job in stage.chat.jobs:
        await job.ended()
    await stage.until(lambda: not stage.chat.busy)


def render(events: Any, result: Any) -> Report:
    return Report("job", (Lines([str(len(events)), str(result)]),))
