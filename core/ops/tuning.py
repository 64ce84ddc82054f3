"""Has the forms of a model's operations tried and timed in a child process, and adopts what came of it.

The verdict is kept, so only the first load on a machine waits for it, and not for long. Where the process
crashes or hangs, a sentence says so, and the form that it was trying is not used. With QCHAT_TUNE=off nothing
is tried.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..kernels.launch import distrust, forced_on, may_try, trust, tuned
from . import choices
from .candidates import Dimensions
from .verdicts import Record, Result, limit_of, winners

COMMAND = (sys.executable, "-P", "-m", "qchat.core.ops.race")
LOAD_SECONDS = 3.0  # that loading a model may wait
GPU_LIMIT_SECONDS, CPU_LIMIT_SECONDS = 4.0, 120.0  # for one form
GRACE_SECONDS = 0.5  # before a child that should have ended itself is killed
POLL_SECONDS, END_SECONDS = 0.02, 10.0
MAX_CHILDREN = 12


class Tuner:
    """The contests of one model on this machine."""

    def __init__(
        self,
        dimensions: Dimensions,
        record: Record | None = None,
        *,
        command: Sequence[str] | None = None,
        limit_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`command` is what tries the forms, each for at most `limit_seconds`."""
        usual = GPU_LIMIT_SECONDS if may_try() else CPU_LIMIT_SECONDS
        self.dimensions, self.record = dimensions, record or Record.of(dimensions)
        self._command, self._clock = command or COMMAND, clock
        self._limit_seconds = usual if limit_seconds is None else limit_seconds
        self.busy = False  # whether somebody waits for the end
        self._child: subprocess.Popen[bytes] | None = None
        self._children = 0
        self._heard, self._size = clock(), -1

    @property
    def complete(self) -> bool:
        """Whether everything was tried."""
        return self.record.complete

    @property
    def idle(self) -> bool:
        """Whether there is something to try, and nobody is at it or has tried too often."""
        return not (self.busy or self.complete or self._children >= MAX_CHILDREN)

    @property
    def results(self) -> list[Result]:
        return self.record.results()

    @property
    def winners(self) -> dict[choices.Key, str]:
        return winners(self.results)

    def begin(self) -> None:
        """Start a child process, unless everything was tried or another process is at it."""
        if self.complete or self.record.racing or self._children >= MAX_CHILDREN:
            return
        quiet, paths = subprocess.DEVNULL, os.pathsep.join(path for path in sys.path if path)
        arguments = [str(self.record.path), json.dumps(self.dimensions.as_json()), str(self._limit_seconds)]
        with suppress(OSError):  # what cannot be started is not needed
            self._child = subprocess.Popen(
                [*self._command, *arguments],
                env=os.environ | {"PYTHONPATH": paths},
                stdin=quiet,
                stdout=quiet,
                stderr=quiet,
                start_new_session=True,
            )
            self._heard = self._clock()
        self._children += 1

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until everything was tried, at most `seconds`; start another child where one ended early.

        Returns whether everything was tried. What is left goes on in the child.
        """
        end = None if seconds is None else self._clock() + seconds
        self.busy = seconds is None
        while not self.complete and (end is None or self._clock() < end):
            if self._child is None and self._children >= MAX_CHILDREN:
                break
            self._look_after_child()
            time.sleep(POLL_SECONDS)
        if self.complete and self._child is not None:
            with suppress(subprocess.TimeoutExpired):  # it has nothing left to do but to end
                self._child.wait(END_SECONDS)
        self.busy = False
        return self.complete

    def _look_after_child(self) -> None:
        """Start a child where there is none, and kill one that has written nothing for too long."""
        if self._child is None:
            self.begin()
            return
        if self._child.poll() is not None:
            self._child = None
            return
        size, now = _size(self.record.path), self._clock()
        if size != self._size:
            self._size, self._heard = size, now
        elif (
            size > 0
            and now - self._heard > limit_of(self.record.current, self._limit_seconds) + GRACE_SECONDS
        ):
            self._child.kill()

    def adopt(self) -> list[str]:
        """Use the winners for layers built from now on; return sentences about what failed."""
        results = self.results
        choices.adopt(winners(results))
        ours = [result for result in results if result.form == choices.OURS]
        if any(result.failure for result in ours):
            distrust()
        elif ours and self.complete:
            trust()
        elif self.record.racing and self.record.current == choices.OURS and not ours:
            distrust()  # for now: it may be hanging
        return sentences(results)


def sentences(results: Sequence[Result]) -> list[str]:
    """Say what failed: qchat's own kernels in one sentence, other forms in one each."""
    failed = [result for result in results if result.failure]
    ours = [result for result in failed if result.form == choices.OURS]
    said = [
        f"the form {result.form} of {result.operation} is not used here: {result.failure}"
        for result in failed
        if result.form != choices.OURS
    ]
    if not ours:
        return said
    wrong = [result.error for result in ours if result.error is not None]
    if len(wrong) == len(ours):
        worst = max((error for error in wrong if error == error), default=float("nan"))
        return [*said, f"qchat's GPU kernels are off by {worst:.0%} here, so MLX's own are used"]
    reason = next(result.failure for result in ours if result.error is None)
    return [*said, f"qchat's GPU kernels do not run here, so MLX's own are used: {reason}"]


def settle(dimensions: Dimensions, report: Callable[[str], None] = lambda _: None) -> tuple[Tuner, list[str]]:
    """Adopt what is known of these dimensions here, before layers are built; return sentences about failures.

    Where our kernels might run, what is unknown is tried first, for LOAD_SECONDS, or until the end with
    QCHAT_KERNELS=on; `report` is told so.
    """
    tuner = Tuner(dimensions)
    if not tuned():
        return tuner, []
    if may_try() is not None and not tuner.complete:
        report("trying which kernels are fastest here")
        tuner.begin()
        tuner.wait(None if forced_on() else LOAD_SECONDS)
    return tuner, tuner.adopt()


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
