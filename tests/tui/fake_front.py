"""A front end that remembers what commands asked of it, and answers as the test says."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

from qchat.core.conversation.summary import ConversationState, Turn
from qchat.core.events import Done
from qchat.tui.chat.controller import Chat
from qchat.tui.chat.decoding import Batch
from qchat.tui.chat.jobs import Job
from qchat.tui.commands import perform
from qchat.tui.text.report import Report, report_lines, report_text
from qchat.tui.user.settings import Settings
from tests.tui.fake_engine import FakeEngine


class FakeFront:
    """`calls` are (method, argument); `answers` what confirm, choose and edit_text give, in their order."""

    def __init__(self, *answers: Any, screens: bool = False):
        self.answers, self.screens = list(answers), screens
        self.calls: list[tuple[str, Any]] = []

    def question(self, turn: Turn) -> None:
        self.calls.append(("question", turn.question))

    def events(self, batch: Batch) -> None: ...

    def finished(self, done: Done, turn: Turn) -> None:
        del done
        self.calls.append(("finished", turn.answer))

    def returned(self, text: str) -> None:
        self.calls.append(("returned", text))

    def rebuilt(self, state: ConversationState) -> None:
        self.calls.append(("rebuilt", [turn.question for turn in state.turns]))

    def status(self, status: Any) -> None: ...

    def note(self, text: str, kind: str = "info") -> None:
        self.calls.append((kind, text))

    def report(self, report: Report) -> None:
        self.calls.append(("report", report))

    def job(self, job: Job) -> None:
        self.calls.append(("job", job.title))

    def job_changed(self, job: Job) -> None: ...

    async def confirm(self, question: str) -> bool:
        self.calls.append(("confirm", question))
        return self.answers.pop(0)

    async def choose(self, title: str, options: list[tuple[str, str]]) -> str | None:
        self.calls += [("title", title), ("choose", options)]
        return self.answers.pop(0)

    def put_prompt(self, text: str) -> None:
        self.calls.append(("put_prompt", text))

    async def edit_text(self, text: str) -> str | None:
        self.calls.append(("edit_text", text))
        return self.answers.pop(0)

    def copy(self, text: str) -> str:
        self.calls.append(("copy", text))
        return "copied"

    def find(self, text: str) -> int:
        self.calls.append(("find", text))
        return 2

    def screen(self, name: str) -> bool:
        self.calls.append(("screen", name))
        return self.screens

    def set_theme(self, name: str) -> None:
        self.calls.append(("set_theme", name))

    def show_thinking(self, shown: bool) -> None:
        self.calls.append(("show_thinking", shown))

    def mouse(self, on: bool) -> None:
        self.calls.append(("mouse", on))

    async def leave(self, to: Literal["shell", "plain"]) -> None:
        self.calls.append(("leave", to))

    def all(self, kind: str) -> list[Any]:
        return [value for name, value in self.calls if name == kind]

    @property
    def said(self) -> str:
        """Every note, error and report, as text."""
        shown = [report_text(v) if k == "report" else v for k, v in self.calls if k in SAID]
        return "\n".join(shown)

    def check_widths(self) -> None:
        """Every report fits into narrow and wide screens."""
        from qchat.tui.text.sanitise import cells

        for report in self.all("report"):
            for width in (20, 60, 100):
                lines = report_lines(report, width)
                assert all(cells("".join(text for _, text in line)) <= width for line in lines)


SAID = ("info", "warning", "error", "report")


class Stage:
    """A chat with this front end, an engine that was scripted, and a model."""

    def __init__(
        self, folder: Path, *steps: dict[str, Any], front: FakeFront | None = None, store: Any = None
    ):
        self.folder = folder
        self.fake = FakeEngine(folder, *steps)
        self.front = front or FakeFront()
        options = Settings().replaced("test", models_dir=[str(folder / "models")])
        self.chat = Chat(self.front, self.fake.client, settings=options, store=store)

    def play(self, *lines: str | Callable[["Stage"], Awaitable[Any]], load: bool = True) -> FakeFront:
        """Submit `lines` one after the other, each when the one before has been done."""

        async def run() -> None:
            try:
                if load:
                    await self.chat.load("/models/fake-4bit")
                    self.front.calls.clear()
                for line in lines:
                    await (perform(line, self.chat, self.front) if isinstance(line, str) else line(self))
                for job in self.chat.jobs:
                    await job.ended()
            finally:
                await self.chat.quit()

        asyncio.run(asyncio.wait_for(run(), 30))
        self.front.check_widths()
        return self.front


async def at_rest(stage: Stage) -> None:
    """Wait until every job has ended and the chat has its model again."""
    for job in stage.chat.jobs:
        await job.ended()
    while stage.chat.busy:
        await asyncio.sleep(0.01)
