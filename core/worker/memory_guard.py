"""Acts on memory pressure in an engine process: frees caches, refuses and ends jobs, stops the reply.

Environment: QCHAT_PRESSURE (`auto`, `off`). A thread watches; what touches the conversation waits for
`serve`, which the thread that computes calls between two events. Never raises a limit on wired memory.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ..conversation.session import Session
from ..errors import DoesNotFit, QchatError, UsageError
from ..machine.backend import mx
from ..machine.linux_cpu import return_freed_pages
from ..machine.pressure import CHECK_SECONDS, PressureWatch, Reading, read_pressure
from ..quoting import quote_value

# jobs that load a model
LARGE_JOBS = ("convert", "calibrate", "eval", "bench", "compare")
CACHE_NBYTES = 64 << 20  # that MLX may keep while memory is low
CACHE_STEPS = 1  # of which the user need not hear when they were enough
WAIT = "close other programs, or wait until memory is free"
REPLY_STOPPED = (
    "this machine is running out of memory, so the reply was stopped before the system had to swap: "
    "close other programs, then continue"
)


class MemoryGuard:
    """The steps of one engine process; `session` returns its conversation, if any.

    `say` shows a sentence to the user, `wake` asks for a call of `serve`; both work from any thread.
    """

    def __init__(
        self,
        session: Callable[[], Session | None],
        say: Callable[[str], None],
        wake: Callable[[], None],
        read: Callable[[], Reading] = read_pressure,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._session, self._say, self._wake, self._read = session, say, wake, read
        self._started = self._drops_snapshots = self._refuses_jobs = self._ends_job = False
        self._job: str | None = None
        self._cache_limit: int | None = None
        caches = (self._drop_cache, self._ask_for_snapshots)
        work = (self._refuse_jobs, self._end_job, self._stop_reply)
        self.watch = PressureWatch((*caches, *work), self._relieved, read, clock)

    def start(self) -> None:
        """Watch from now on, on a thread of its own. Raises UsageError for a bad QCHAT_PRESSURE."""
        choice = os.environ.get("QCHAT_PRESSURE", "auto")
        if choice not in ("auto", "off"):
            raise UsageError(f"QCHAT_PRESSURE is {quote_value(choice)}, wanted auto, off")
        self._started = choice == "auto"
        if self._started:
            threading.Thread(target=self._run, name="memory", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.watch.check()
            time.sleep(CHECK_SECONDS)

    # the steps, on the thread that watches

    def _drop_cache(self) -> None:
        self._cache_limit = mx.set_cache_limit(CACHE_NBYTES)
        _release()

    def _ask_for_snapshots(self) -> None:
        self._drops_snapshots = True
        self._wake()

    def _refuse_jobs(self) -> None:
        self._refuses_jobs = True
        self._say("memory is low, so no new job is started until more is free")

    def _end_job(self) -> None:
        self._ends_job = self._job is not None

    def _stop_reply(self) -> None:
        if self._job is None and (session := self._session()) is not None:
            session.cancel(REPLY_STOPPED)

    def _relieved(self, taken: int) -> None:
        if self._cache_limit is not None:
            mx.set_cache_limit(self._cache_limit)
        self._drops_snapshots = self._refuses_jobs = self._ends_job = False
        if taken > CACHE_STEPS:
            self._say("enough memory is free again")

    # on the thread that computes

    def serve(self) -> None:
        """Take the steps that touch the conversation."""
        if not self._drops_snapshots:
            return
        self._drops_snapshots = False
        session = self._session()
        nbytes = _drop_snapshots(session) if session else 0
        _release()
        if nbytes:
            self._say(
                f"memory is low, so {nbytes / 1e6:,.0f} MB of snapshots were freed: "
                "going back to earlier turns reads them again"
            )

    def begin_job(self, method: str) -> None:
        """Note that a job begins. Raises DoesNotFit for one that loads a model while memory is low."""
        if method in LARGE_JOBS and (self._refuses_jobs or (self._started and self._read().is_low)):
            raise DoesNotFit(f"{method} was not started, because memory is low: {WAIT}")
        self._job = method if method in LARGE_JOBS else None

    def check_job(self) -> None:
        """Raise DoesNotFit if the job has to end."""
        if self._ends_job and self._job:
            raise DoesNotFit(
                f"{self._job} was ended before the system had to swap: {WAIT}, then start it again"
            )

    def end_job(self) -> None:
        """Note that no job runs."""
        self._job, self._ends_job = None, False


def _drop_snapshots(session: Session) -> int:
    """Free all snapshots; returns their bytes. Between replies the most useful one is saved before."""
    snapshots = session.live.snapshots
    nbytes = snapshots.nbytes
    if nbytes:
        with suppress(QchatError):  # without a store, during a reply, or with a full disk nothing is saved
            session.save_state()
    snapshots.clear()
    return nbytes


def _release() -> None:
    """Give the memory of arrays that are gone back to the system."""
    mx.clear_cache()
    return_freed_pages()
