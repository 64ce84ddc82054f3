"""Transfer of a model from the Hugging Face hub into the cache that it shares with other tools.

The model's folder appears in the cache once all its files are complete and verified.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ..machine.eta import TimeEstimate
from .failures import FAILURES, RESUMABLE, DownloadCancelled, explain_failure
from .listing import GB, DownloadPlan, never
from .tasks import Task, wait_for
from .transfer import (
    Monitor,
    RemoteFile,
    Transfer,
    TransferStopped,
    commit_file,
    exclusive_lock,
    hub_request,
    is_intact,
)

PARALLEL = 4
SPEED_SECONDS = 10.0  # over which the speed is averaged


@dataclass(frozen=True)
class DownloadProgress:
    """Progress in bytes on the disk; `detail` says what is going on."""

    done: int
    total: int
    detail: str
    seconds_left: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {"event": "progress", "unit": "bytes", **vars(self)}


def download_model(
    plan: DownloadPlan,
    progress: Callable[[DownloadProgress], None] | None = None,
    cancelled: Callable[[], bool] = never,
) -> Path:
    """Download the missing bytes, verify every file, publish the model's folder and return it.

    Calls `progress` ten times a second. Received bytes are kept on any error. Raises ModelError, DoesNotFit
    for a full disk, and DownloadCancelled once `cancelled` returns true.
    """
    plan.check_disk()
    monitor = Monitor()
    meter = _ProgressMeter(plan, monitor, progress)
    files: SimpleQueue[RemoteFile] = SimpleQueue()
    for file in sorted(plan.files, key=lambda file: file.nbytes):
        files.put(file)

    def work() -> None:
        with suppress(Empty):
            while True:
                _download_file(plan, files.get_nowait(), monitor)

    try:
        wait_for([Task(work) for _ in range(PARALLEL)], monitor, cancelled, tick=meter.report)
        digests = {file.name: file.digest for file in plan.files}
        plan.repository.publish(plan.commit, digests, plan.revision)
    except TransferStopped:
        raise DownloadCancelled(
            f"the download of {plan.id} was cancelled at {meter.done / GB:.2f} of {plan.nbytes / GB:.2f} GB: "
            "start it again to resume"
        ) from None
    except FAILURES as error:
        raise explain_failure(error, plan.id, plan.revision, RESUMABLE) from error
    meter.report()
    return plan.folder


class _ProgressMeter:
    """Reports the progress of a download, with the time left estimated from the last SPEED_SECONDS."""

    def __init__(
        self, plan: DownloadPlan, monitor: Monitor, progress: Callable[[DownloadProgress], None] | None
    ):
        self._total, self._monitor, self._progress = plan.nbytes, monitor, progress
        self._estimate = TimeEstimate(window=SPEED_SECONDS)

    @property
    def done(self) -> int:
        return sum(tuple(self._monitor.done.values()))

    def report(self) -> None:
        if self._progress is None:
            return
        received = sum(tuple(self._monitor.received.values()))
        left = self._estimate.seconds_left(received, self._total - self.done)
        self._progress(DownloadProgress(self.done, self._total, self._monitor.problem or "downloading", left))


def _download_file(plan: DownloadPlan, file: RemoteFile, monitor: Monitor) -> None:
    """Download the blob of `file`, unless an intact one exists."""
    blob = plan.repository.blob(file.digest)
    with exclusive_lock(plan.repository.lock(file.digest), monitor):
        if is_intact(blob, file, monitor) or is_intact(plan.folder / file.name, file, monitor):
            return
        blob.unlink(missing_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with plan.repository.partial(file.digest).open("a+b") as out:
            if file.name in plan.loaded:
                out.truncate(0)
                out.write(plan.loaded[file.name])
                monitor.done[file.name] = file.nbytes
            else:
                Transfer(file, out, hub_request(plan.id, plan.commit), monitor).run()
            commit_file(out, blob)
