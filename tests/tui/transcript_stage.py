"""A stage with nothing but a transcript on it, and what can be done and read there."""

import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from rich.cells import cell_len
from textual import on
from textual.app import App, ComposeResult
from textual.geometry import Offset
from textual.message import Message
from textual.pilot import Pilot

from qchat.core.conversation.summary import ConversationState, Turn, TurnStats
from qchat.core.events import Performance, Text, Thought
from qchat.tui.chat.turns import NO_STATE
from qchat.tui.widgets.transcript.messages import (
    CopyRequested,
    EditRequested,
    FindRequested,
    ForkRequested,
    MenuRequested,
    RetryRequested,
    SiblingRequested,
)
from qchat.tui.widgets.transcript.transcript import Transcript
from tests.fake_clock import FakeClock
from tests.run_async import run_async

HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\rd\x9b31me\u202ef\u2066\tg\x00h\x08 \udc80"
UNICODE = "漢字を書く 👩‍👩‍👧 👍🏽 ❤️ e\u0301 עברית العربية ﷽ 1️⃣ 🏳️‍🌈 क्षि"
CODE = "# Title\n\ntext\n\n```python\ndef f(x):\n\treturn x\n```\n\n- item\n\n  ```sh\n  ls -l\n  ```\n\nend"


STATS = TurnStats(reasoning_tokens=1212, performance=Performance(seconds_thinking=4.1))


def turn(number: int, **more: Any) -> Turn:
    made = Turn(
        number=number,
        role="user",
        question=f"question {number}",
        thinking=f"thought {number}",
        answer=f"answer {number}",
        tool_calls=(),
        finish_reason="stop",
        node=0,
        siblings=(),
        stats=STATS,
        created=1_700_000_000.0,
    )
    return replace(made, **more)


def state(*turns: Turn, conversation: int | None = 1) -> ConversationState:
    return replace(NO_STATE, conversation=conversation, turns=turns)


def long_turns(count: int) -> list[Turn]:
    return [turn(n + 1, answer=f"answer {n + 1}\n\n" + "some words " * (n * 7 % 60)) for n in range(count)]


def said(text: str, kind: str = "text") -> Text | Thought:
    return Text(text) if kind == "text" else Thought(text)


class TranscriptApp(App[None]):
    """A transcript alone, without the focus at first; keeps what it asks for."""

    AUTO_FOCUS = ""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []
        self.clock = FakeClock()
        self.transcript = Transcript(clock=self.clock)

    def compose(self) -> ComposeResult:
        yield self.transcript

    @on(CopyRequested)
    @on(EditRequested)
    @on(FindRequested)
    @on(ForkRequested)
    @on(MenuRequested)
    @on(RetryRequested)
    @on(SiblingRequested)
    def keep(self, message: Message) -> None:
        self.asked.append(message)


class TranscriptScene:
    """The app, how to wait, and what can be read on it."""

    def __init__(self, app: TranscriptApp, pilot: Pilot) -> None:
        self.app, self.pilot, self.transcript = app, pilot, app.transcript

    async def settle(self) -> None:
        """Until all that was fed is on the screen."""
        await self.pilot.pause(0.05)
        while self.transcript._flush_due:
            await self.pilot.pause(0.02)
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        self.transcript.focus()
        await self.pilot.pause()
        await self.pilot.press(*keys)
        await self.settle()

    async def show(self, *turns: Turn, conversation: int | None = 1) -> None:
        self.transcript.show(state(*turns, conversation=conversation))
        await self.settle()

    async def stream(self, *pieces: str, kind: str = "text") -> None:
        for piece in pieces:
            self.transcript.feed([said(piece, kind)])
        await self.settle()

    async def measured(self) -> None:
        """Until no height is a guess."""
        for _ in range(400):
            if next(self.transcript._rows.guessed(), None) is None:
                return
            await self.pilot.pause(0.05)
        raise AssertionError("measuring does not end")

    def rows(self) -> list[str]:
        """The rows on the screen."""
        return [self.transcript.render_line(y).text.rstrip() for y in range(self.transcript.size.height)]

    def all_rows(self) -> list[str]:
        transcript = self.transcript
        return [
            "".join(span.text for span in block.row(row, transcript._look).spans).rstrip()
            for block in transcript.blocks
            for row in range(block.height(transcript._look))
        ]

    def where(self, text: str) -> int:
        return next(y for y, row in enumerate(self.rows()) if text in row)

    async def click(self, text: str) -> None:
        y = self.where(text)
        row = self.rows()[y]
        await self.pilot.click(self.transcript, offset=Offset(cell_len(row[: row.index(text)]) + 1, y))
        await self.settle()


def played(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test on an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_async(test(*args, **kwargs))

    return run


@asynccontextmanager
async def scene(width: int = 60, height: int = 20) -> AsyncIterator[TranscriptScene]:
    app = TranscriptApp()
    async with app.run_test(size=(width, height)) as pilot:
        yield TranscriptScene(app, pilot)
