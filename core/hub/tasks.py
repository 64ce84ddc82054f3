"""Background threads for network work, so that the caller can report progress and cancel at any time."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from .transfer import Monitor, TransferStopped

TICK_SECONDS = 0.1
GRACE_SECONDS = 0.4  # for threads to end after they were stopped


class Task(threading.Thread):
    """A function that runs in a daemon thread, started at once."""

    def __init__(self, function: Callable[[], Any]):
        super().__init__(daemon=True)
        self._function = function
        self.value: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:  # wait_for raises it in the caller's thread
            self.error = error


def wait_for(
    tasks: Sequence[Task],
    monitor: Monitor,
    cancelled: Callable[[], bool],
    timeout_seconds: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Return the values of all tasks; call `tick` every TICK_SECONDS.

    The first failure stops the other tasks and is raised. Raises TransferStopped when `cancelled` returns
    true, httpx2.ConnectTimeout after the timeout.
    """
    end = time.monotonic() + timeout_seconds
    try:
        while running := [task for task in tasks if task.is_alive()]:
            if cancelled():
                raise TransferStopped
            if time.monotonic() > end:
                raise httpx2.ConnectTimeout(f"no answer within {timeout_seconds:g} seconds")
            if any(task.error for task in tasks):
                break
            tick()
            running[0].join(TICK_SECONDS)
    finally:
        monitor.stop.set()
        for task in tasks:
            task.join(GRACE_SECONDS / len(tasks))
    errors = [task.error for task in tasks if task.error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, TransferStopped)):
        raise error
    return [task.value for task in tasks]
