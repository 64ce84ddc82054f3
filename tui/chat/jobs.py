"""Jobs: long operations, each in an engine process of its own beside the chat.

A job's process ends with it. A job that ignores a cancel is killed after a while.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.errors import QchatError
from ...core.worker.protocol import Cancelled
from .client import Call, EngineClient

if TYPE_CHECKING:
    from ..text.report import Report

JobState = Literal["running", "done", "failed", "cancelled"]
Render = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any] | None], "Report"]
CHANGES_PER_SECOND = 10
# large matrix products cannot be interrupted
CANCEL_SECONDS = 20.0
LONG_SECONDS = 10.0
MEASURING = ("bench", "compare")  # jobs that measure speeds
NOT_ALONE = "something else ran meanwhile: these speeds are not comparable, and not kept"
NOT_FIGURES = ("event", "place", "against")


class Job:
    """One job: its `events` so far, of progress only the last; `error` says why it has no `result`."""

    def __init__(
        self,
        title: str,
        method: str,
        params: Mapping[str, Any],
        render: Render,
        changed: Callable[["Job"], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.title, self.method, self.params = title, method, params
        self.state: JobState = "running"
        self.events: list[dict[str, Any]] = []
        self.result: dict[str, Any] | None = None
        self.error = ""
        self.measures = method in MEASURING
        self.place: tuple[int | None, int] = (None, 0)  # the conversation and turn that it belongs to
        self.waits_for = ""  # what has to end before the job begins
        self.overlapped = False  # whether something else ran while it measured speeds
        self.alone = False  # whether it has the memory of the chat's model
        self.begin, self.seconds = clock(), 0.0
        self.log: list[str] = []
        self._render, self._changed, self._clock = render, changed, clock
        self._call: Call | None = None
        self.client: EngineClient | None = None
        self._told = 0.0
        self._ended = asyncio.Event()
        self._cancelled = False
        self._killing: asyncio.TimerHandle | None = None

    @property
    def is_active(self) -> bool:
        """Whether the job has begun to run, not only to wait, and has not ended."""
        return self.state == "running" and self.client is not None

    @property
    def warning(self) -> str:
        """A sentence about figures that are not to be trusted; empty where they are."""
        return NOT_ALONE if self.overlapped else ""

    @property
    def seconds_left(self) -> float | None:
        """The estimate of the last progress event."""
        told = (event.get("seconds_left") for event in self.events if event.get("event") == "progress")
        return next(told, None)

    @property
    def share(self) -> float | None:
        """The share that is done, by the last progress event; None where that is unknown."""
        told = next((event for event in self.events if event.get("event") == "progress"), None)
        return told["done"] / told["total"] if told and told.get("total") else None

    @property
    def age(self) -> float:
        """The seconds since the job began."""
        return self._clock() - self.begin

    @property
    def is_long(self) -> bool:
        """Whether so much work would be lost that a slip of the finger must not end the job."""
        return not self.waits_for and self.age >= LONG_SECONDS

    @property
    def stopping(self) -> bool:
        """Whether the job was cancelled and has not ended yet."""
        return self._cancelled and self.state == "running"

    def report(self) -> "Report":
        """Return what to show of the job now."""
        return self._render(self.events, self.result)

    def cancel(self) -> None:
        """Ask the job to stop; a conversion leaves nothing half-written."""
        if self.state != "running" or self._cancelled:
            return
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()
        self._killing = asyncio.get_running_loop().call_later(CANCEL_SECONDS, self._kill)
        self._changed(self)

    async def ended(self) -> None:
        """Wait for the end of the job."""
        await self._ended.wait()

    async def run(self, client: EngineClient) -> None:
        """Run the job in a process that `client` starts; its errors go to `error`."""
        self.client, self.begin = client, self._clock()
        try:
            if not self._cancelled:
                await client.start()
            await self._follow(client)
            self.state = "done"
        except Cancelled:
            self.state = "cancelled"
        except QchatError as error:
            self.state, self.error = ("cancelled", "") if self._cancelled else ("failed", str(error))
        finally:
            if self._killing is not None:
                self._killing.cancel()
            await client.stop()
            self.log = list(client.log)
            if self.state == "running":  # this task itself was cancelled
                self.state = "cancelled"
            self.seconds = self.age
            self._ended.set()
            self._changed(self)

    async def _follow(self, client: EngineClient) -> None:
        if self._cancelled:
            raise Cancelled("cancelled before it began")
        self._call = client.call(self.method, **self.params)
        async for batch in self._call:
            self._take(batch)
        self.result = await self._call.result()

    def _take(self, batch: list[Any]) -> None:
        for event in batch:
            if event.get("event") == "progress":
                self.events = [other for other in self.events if other.get("event") != "progress"]
            self.events.append(event)
        now = self._clock()
        self.seconds = now - self.begin
        if now - self._told >= 1 / CHANGES_PER_SECOND or any(e.get("event") == "row" for e in batch):
            self._told = now
            self._changed(self)

    def _kill(self) -> None:
        if self.client is not None:
            self.client.kill()


def keep_speeds(job: Job, path: Path) -> None:
    """Store what a benchmark measured while nothing else ran, for the lists of models. Raises QchatError."""
    from ...core import Measurements

    if job.method != "bench" or job.overlapped:
        return
    for event in job.events:
        if event.get("event") == "row" and event.get("path"):
            figures = {name: value for name, value in event.items() if name not in NOT_FIGURES}
            Measurements(path).add(Path(event["path"]), figures)
