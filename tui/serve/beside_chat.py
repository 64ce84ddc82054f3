"""A server beside the chat: it answers with the chat's engine, in turn with the chat, and ends with it."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.errors import QchatError
from ...core.worker.wire import ModelInfo
from ..text.report import Lines, Report, Table
from ..text.sanitise import printable
from .backend import Activity, Backend
from .errors import RequestError
from .server import ServeOptions, Server

if TYPE_CHECKING:
    from ..chat.client import EngineClient
    from ..chat.controller import Chat

ENDED_KEPT = 20
# how often the speed of requests under way is shown anew
TICK_SECONDS = 0.5
COLUMNS = ("client", "state", "prompt", "cached", "generated", "tok/s")


class ChatEngine:
    """The engine of a chat as a source: never loads a model of its own, but restarts an engine that died.

    A reply of the chat and a request wait for each other in the engine, which serves in order of arrival; the
    queue of the server lets one request at a time wait there, so both take turns.
    """

    def __init__(self, chat: "Chat"):
        self._chat = chat

    @property
    def model(self) -> ModelInfo | None:
        return self._chat.model

    @property
    def ready(self) -> bool:
        client = self._chat.client
        return self._chat.model is not None and client is not None and client.alive

    async def client(self) -> "EngineClient":
        """Return the chat's client. Raises RequestError (503) if it has no model now."""
        chat = self._chat
        if chat.status.phase == "dead":
            try:
                await chat.restart()
            except QchatError as error:
                raise _unavailable(str(error)) from error
        if chat.parked:
            raise _unavailable("a job has the memory of the model: try again when it has ended")
        if not self.ready or chat.client is None:
            raise _unavailable("the chat has no model loaded now: try again when it has one")
        return chat.client


def _unavailable(why: str) -> RequestError:
    return RequestError(503, why, "model_unavailable", headers={"retry-after": "5"})


class ChatServer:
    """Serves from its creation until `stop`; `ended` are the last requests that have ended, newest first."""

    def __init__(self, chat: "Chat", options: ServeOptions):
        """Bind the socket and begin. Raises UsageError as `Server` does."""
        self._chat = chat
        # a schema is for the chat's own answers: programs say themselves what they want
        settings = {**chat.settings.reply(), "schema": None}
        self._backend = Backend(ChatEngine(chat), settings=settings)
        self._server = Server(self._backend, options)
        self.ended: deque[Activity] = deque(maxlen=ENDED_KEPT)
        self._count = self._backend.on_end
        self._backend.on_begin, self._backend.on_end = self._begin, self._end
        self._ticking: asyncio.Task[None] | None = None
        self._running = asyncio.create_task(self._server.run())
        self._show()

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def greeting(self) -> str:
        """A sentence that says what is served where."""
        return (
            f"{self._backend.model_name} answers at {self.url}/v1; /serve lists requests, /serve stop ends it"
        )

    async def stop(self, *, at_once: bool = False) -> None:
        """End the server; cancel the replies that run, `at_once` without waiting for their clients."""
        self._server.stop(at_once=at_once)
        await asyncio.wait({self._running})
        if self._ticking is not None:
            self._ticking.cancel()
        self._chat.status.serving = ""
        self._chat.view.status(self._chat.status)

    def report(self) -> Report:
        """Return a table of the requests under way and those that ended last."""
        rows = [_row(one) for one in [*self._backend.activities.values(), *self.ended]]
        if not rows:
            return Report(self.greeting, (Lines(("no requests yet",), "dim"),))
        return Report(self.greeting, (Table(COLUMNS, rows, "<<>>>>"),))

    def _begin(self, _: Activity) -> None:
        self._chat.job_queue.disturb()  # what is measured meanwhile
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.create_task(self._tick())

    def _end(self, activity: Activity) -> None:
        self._count(activity)
        self.ended.appendleft(activity)
        self._show()

    async def _tick(self) -> None:
        """Show the requests while there are any."""
        while self._backend.activities:
            self._show()
            await asyncio.sleep(TICK_SECONDS)

    def _show(self) -> None:
        self._chat.status.serving = _summary(list(self._backend.activities.values()))
        self._chat.view.status(self._chat.status)


def _summary(activities: Sequence[Activity]) -> str:
    """Return the requests as the status row shows them."""
    if not activities:
        return "serving"
    speed = sum(one.tokens_per_s for one in activities if one.running)
    count = f"serving {len(activities):,} request{'s' * (len(activities) > 1)}"
    return f"{count} at {speed:,.1f} tok/s" if speed else count


def _row(activity: Activity) -> list[str]:
    done = activity.done
    prompt = done.prompt_tokens if done else activity.prompt_tokens
    cached = done.cached_tokens if done else activity.cached_tokens
    generated = done.generated_tokens if done else activity.generated_tokens
    speed = done.performance.decode_tokens_per_s if done else activity.tokens_per_s
    return [
        printable(activity.client),
        _state(activity),
        f"{prompt:,}" if prompt else "",
        f"{cached / prompt:.0%}" if prompt else "",
        f"{generated:,}" if generated else "",
        f"{speed:,.1f}" if speed else "",
    ]


def _state(activity: Activity) -> str:
    if activity.ended is not None:
        return f"{activity.end}, {activity.ended - activity.begun:.1f} s"
    if not activity.running:
        return f"waiting, {time.monotonic() - activity.begun:.0f} s"
    return "reading" if activity.first_token is None else "answering"
