"""The folder a conversion grows in, `.NAME.partial` beside its destination, which appears whole by a rename.

Owns resuming: finished shards of the same conversion are kept. Replaces and removes only what qchat wrote;
refuses any other folder that is in its way, a second conversion to the same place, and a disk too small.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DoesNotFit, UsageError
from ..machine.files import read_json
from .writer import UNFINISHED, Shard, write_file

REPORT_NAME = "conversion.json"
TOOL = "qchat convert"
GB = 10**9
FULL = (errno.ENOSPC, errno.EDQUOT)


class Staging:
    """A locked staging folder; made by `open_staging`. `is_ours` once it is known to hold nothing foreign."""

    def __init__(self, target: Path, identity: str):
        self.target, self.folder = target, _beside(target, "partial")
        self.identity = identity
        self.is_ours = False

    def prepare(self) -> None:
        """Keep what an earlier run of the same conversion finished, and remove what it did not."""
        marker = _marker(self.folder)
        if marker is None and any(not entry.name.endswith(UNFINISHED) for entry in self.folder.iterdir()):
            raise UsageError(
                f"{self.folder} is in the way of the conversion and was not made by one: remove it first"
            )
        self.is_ours = True
        same = marker is not None and marker.get("identity") == self.identity
        for path in self.folder.iterdir():
            if not same or path.name.endswith(UNFINISHED):
                _remove(path)
        self.write_report({"identity": self.identity})

    def write_report(self, fields: dict[str, Any]) -> None:
        report = json.dumps({"tool": TOOL, **fields}, indent=2).encode()
        write_file(self.folder / REPORT_NAME, report)

    def is_finished(self, shard: Shard) -> bool:
        """Only a whole file, known to be on the disk, has its final name."""
        path = self.folder / shard.file
        return path.is_file() and path.stat().st_size == shard.nbytes

    def check_disk(self, needed: int) -> None:
        """Raises DoesNotFit where the disk of the destination has less than `needed` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise DoesNotFit(
                f"converting to {self.target} needs {needed / GB:.3f} GB of disk and {free / GB:.3f} GB are "
                "free: free some, or choose a place on another disk"
            )

    def publish(self, force: bool) -> None:
        """Give the finished folder its name. Raises UsageError where something has taken it meanwhile."""
        check_target(self.target, force)
        _sync(self.folder)
        old = _beside(self.target, "replaced")
        if self.target.exists() and any(self.target.iterdir()):
            _remove_conversion(old)  # of a run that was killed
            self.target.rename(old)
        self.folder.rename(self.target)
        _sync(self.target.parent)
        _remove_conversion(old)

    def clean(self, shards: Sequence[Shard]) -> None:
        """After an interruption: finished shards wait for a rerun; where there are none, nothing is left."""
        if not self.is_ours or not self.folder.exists():
            return
        for path in self.folder.glob(f"*{UNFINISHED}"):
            path.unlink()
        if not any(self.is_finished(shard) for shard in shards):
            self.discard()

    def discard(self) -> None:
        if self.is_ours:
            _remove_conversion(self.folder)


@contextmanager
def open_staging(target: Path, identity: str, shards: Sequence[Shard]) -> Iterator[Staging]:
    """A prepared staging folder, to publish within the block; errors of the disk become one sentence.

    Raises UsageError for a place that cannot be written, DoesNotFit where the disk is or becomes full: then
    nothing of the conversion is left.
    """
    staging = Staging(target, identity)
    lock = _locked(staging.folder)
    try:
        staging.prepare()
        yield staging
    except OSError as problem:
        if problem.errno not in FULL:
            staging.clean(shards)
            where = problem.filename or staging.folder
            raise UsageError(f"cannot write {where}: {problem.strerror}") from problem
        staging.discard()
        raise DoesNotFit(
            f"the disk of {target} became full during the conversion, and what was written was removed"
        ) from problem
    except BaseException:
        staging.clean(shards)
        raise
    finally:
        os.close(lock)


def check_target(target: Path, force: bool) -> None:
    """Refuse a destination that exists, but for an empty folder; with `force`, one that qchat did not write.

    Raises UsageError.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is no folder: choose another destination")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise UsageError(f"{target} exists: choose another destination, or --force to replace a conversion")
    marker = _marker(target) or {}
    files = marker.get("files")
    known = set(files) if isinstance(files, list) else set()
    foreign = sorted(path.name for path in target.iterdir() if path.name not in known)
    if foreign:
        raise UsageError(
            f"{target} holds {foreign[0]}, which no conversion wrote, so --force will not remove it"
        )


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{ending}")


def _locked(folder: Path) -> int:
    """Make `folder` if need be and lock it for this process. Raises UsageError."""
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as problem:
        raise UsageError(f"cannot make the folder {folder}: {problem.strerror}") from problem
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not folder.exists() or not os.path.samestat(os.fstat(lock), folder.stat())
    except OSError:
        taken = True
    if taken:
        os.close(lock)
        raise UsageError(f"another conversion is writing to {folder}: wait for it, or choose another place")
    return lock


def _marker(folder: Path) -> dict[str, Any] | None:
    """What qchat wrote about a folder of its own."""
    try:
        fields = read_json(folder / REPORT_NAME, UsageError)
    except UsageError:
        return None
    return fields if fields.get("tool") == TOOL else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove_conversion(folder: Path) -> None:
    """Its marker goes last, so that what a killed run leaves is still known to be qchat's."""
    if _marker(folder) is None:
        return
    for path in folder.iterdir():
        if path.name != REPORT_NAME:
            _remove(path)
    shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """A rename survives a loss of power once its folder is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
