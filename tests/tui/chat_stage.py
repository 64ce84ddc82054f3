"""A chat whose view only remembers, with a scripted engine or the real one, for the time of one scene."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from qchat.core.conversation.summary import ConversationState, Turn
from qchat.core.events import Done, Text
from qchat.tui.chat.client import EngineClient
from qchat.tui.chat.controller import Chat
from qchat.tui.chat.decoding import Batch
from qchat.tui.chat.jobs import Job
from qchat.tui.text.report import Lines, Report
from qchat.tui.user.settings import Settings
from tests.tui.fake_engine import FakeEngine


class Recorder:
    """A view that only remembers, as (method, argument)."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.phases: list[str] = []
        self.text = ""

    def question(self, turn: Turn) -> None:
        self.text = ""
        self.told.append(("question", turn.question))

    def events(self, batch: Batch) -> None:
        self.text += "".join(event.text for event in batch if isinstance(event, Text))

    def finished(self, done: Done, turn: Turn) -> None:
        self.told.append(("finished", (done.finish_reason, turn.answer)))

    def returned(self, text: str) -> None:
        self.told.append(("returned", text))

    def rebuilt(self, state: ConversationState) -> None:
        self.told.append(("rebuilt", [turn.question for turn in state.turns]))

    def status(self, status: Any) -> None:
        if self.phases[-1:] != [status.phase]:
            self.phases.append(status.phase)

    def note(self, text: str, kind: str = "info") -> None:
        self.told.append(("note", (kind, text)))

    def report(self, report: Report) -> None:
        self.told.append(("report", report))

    def job(self, job: Job) -> None:
        self.told.append(("job", job.title))

    def job_changed(self, job: Job) -> None:
        if job.state != "running":
            self.told.append(("job ended", job.state))

    def all(self, kind: str) -> list[Any]:
        return [value for name, value in self.told if name == kind]


class Stage:
    """A chat with a view that remembers, an engine that was scripted, and a model."""

    def __init__(self, folder: Path, *steps: dict[str, Any], store: Any = None, real: bool = False):
        self.fake = FakeEngine(folder, *steps)
        self.view = Recorder()
        factory = EngineClient if real else self.fake.client
        self.chat = Chat(self.view, factory, settings=Settings(), store=store)

    def play(self, scene: Callable[["Stage"], Awaitable[Any]], *, load: str = "/models/a") -> Any:
        """Load the model, unless `load` is empty, run `scene`, and leave."""

        async def run() -> Any:
            try:
                if load:
                    await self.chat.load(load)
                    self.view.told.clear()
                return await scene(self)
            finally:
                await self.chat.quit()

        return asyncio.run(asyncio.wait_for(run(), 60))

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            await asyncio.sleep(0.005)


def render(events: Any, result: Any) -> Report:
    return Report("job", (Lines([str(len(events)), str(result)]),))
