"""The queue of a chat's jobs: which may run now, and what each of the others waits for.

A measurement of speed runs by itself: it waits for jobs and replies, and other jobs wait for it. Jobs that
need the memory of the chat's model have it one after the other.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from .client import EngineClient
from .jobs import Job


class JobHost(Protocol):
    """The chat as its jobs see it."""

    def occupation(self) -> str:
        """Name what the engine does now, or will do at once; empty if it rests."""
        ...

    @property
    def background(self) -> str:
        """Name the work of the engine that no request waits for; empty if there is none."""
        ...

    async def lend_memory(self) -> None:
        """Unload the chat's model."""
        ...

    async def take_memory_back(self) -> None:
        """Load the model again that was unloaded."""
        ...


class JobQueue:
    """All `jobs` of a chat, in the order in which they were asked for."""

    def __init__(
        self, host: JobHost, client_factory: Callable[[], EngineClient], changed: Callable[[Job], None]
    ):
        """`changed` shows a job's new state."""
        self.jobs: list[Job] = []
        self._host, self.client_factory, self._show = host, client_factory, changed
        self._moved = asyncio.Event()

    @property
    def running(self) -> list[Job]:
        """The jobs that have not ended, those that wait included."""
        return [job for job in self.jobs if job.state == "running"]

    def changed(self, job: Job) -> None:
        """Show a job's new state; others may wait for it."""
        self._show(job)
        self.move()

    def move(self) -> None:
        """Let those who wait look again: something began or ended."""
        self._moved.set()
        self._moved = asyncio.Event()

    def disturb(self) -> None:
        """Mark the speeds that are being measured: something else runs as well."""
        for job in self.running:
            if job.measures and job.is_active and not job.overlapped:
                job.overlapped = True
                self._show(job)

    async def run(self, job: Job, keep: Callable[[Job], Awaitable[None]]) -> None:
        """Run a job as soon as nothing is in its way; `keep` gets it when it has ended."""
        await self._wait_in_line(job)
        alone = job.alone and not job.stopping
        if alone:
            await self._host.lend_memory()
        await job.run(self.client_factory())
        await keep(job)
        if alone and not any(self._goes_on_alone(other) for other in self.running):
            await self._host.take_memory_back()

    async def _wait_in_line(self, job: Job) -> None:
        while not job.stopping and (obstacle := self._obstacle(job)):
            moved = self._moved
            if obstacle != job.waits_for:
                job.waits_for = obstacle
                self._show(job)
                moved.set()  # a waiting job is in nobody's way
                moved = self._moved = asyncio.Event()
            await moved.wait()
        job.waits_for = ""

    def _obstacle(self, job: Job) -> str:
        """Name what `job` has to wait for; empty if it may run."""
        earlier = self.jobs[: self.jobs.index(job)]
        blocking = [other for other in self.running if other is not job and _excludes(other, job, earlier)]
        if blocking:
            return ", ".join(other.title for other in blocking)
        occupied = self._host.occupation() if job.measures or job.alone else ""
        return occupied or (self._host.background if job.measures else "")

    def _goes_on_alone(self, job: Job) -> bool:
        return job.alone and not job.stopping and not self._obstacle(job)


def _excludes(other: Job, job: Job, earlier: list[Job]) -> bool:
    """Whether `job` has to wait for `other`: one that runs, or an earlier one that waits for the same."""
    both_alone, both_measure = other.alone and job.alone, other.measures and job.measures
    if other.waits_for:
        return other in earlier and (both_alone or both_measure)
    return other.measures or job.measures or both_alone
