"""The folder that a conversion writes to: `.NAME.partial`, beside its destination until it is renamed.

Owns resuming: keeps finished shards and rounded layers of the same conversion. Replaces and removes only
files that qchat wrote. Refuses any other folder in its way, a second conversion to the same place, and a disk
that is too small.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DoesNotFit, UsageError
from ..machine.files import lock_folder, read_json
from .writer import UNFINISHED, Shard, write_file

REPORT_NAME = "conversion.json"
ROUNDED_NAME = "rounded"
TOOL = "qchat convert"
GB = 10**9
FULL = (errno.ENOSPC, errno.EDQUOT)


class Staging:
    """A locked staging folder, made by `open_staging`; `is_ours` once it is known to hold only our files."""

    def __init__(self, target: Path, identity: str):
        self.target, self.folder = target, _sibling(target, "partial")
        self.identity = identity
        self.is_ours = False

    @property
    def rounded(self) -> Path:
        """The folder of rounded layers, which may not exist; gone once the conversion is published."""
        return self.folder / ROUNDED_NAME

    def prepare(self) -> None:
        """Keep the shards that an earlier run of the same conversion finished and remove all else."""
        marker = _read_marker(self.folder)
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
        """Whether `shard` is complete: only a whole file that is safely on disk has its final name."""
        path = self.folder / shard.file
        return path.is_file() and path.stat().st_size == shard.nbytes

    def check_disk(self, needed: int) -> None:
        """Raise DoesNotFit if the disk of the destination has less than `needed` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise DoesNotFit(
                f"converting to {self.target} needs {needed / GB:.3f} GB of disk and {free / GB:.3f} GB are "
                "free: free some, or choose a place on another disk"
            )

    def publish(self, force: bool) -> None:
        """Give the finished folder its name. Raises UsageError if the name has been taken meanwhile."""
        check_target(self.target, force)
        if self.rounded.exists():
            _remove(self.rounded)
        _sync_folder(self.folder)
        old = _sibling(self.target, "replaced")
        if self.target.exists() and any(self.target.iterdir()):
            _remove_conversion(old)  # left by a run that was killed
            self.target.rename(old)
        self.folder.rename(self.target)
        _sync_folder(self.target.parent)
        _remove_conversion(old)

    def clean(self, shards: Sequence[Shard]) -> None:
        """Clean up after an interruption: keep what the next run can use, or else leave nothing."""
        if not self.is_ours or not self.folder.exists():
            return
        for path in self.folder.glob(f"*{UNFINISHED}"):
            path.unlink()
        if not self.rounded.exists() and not any(self.is_finished(shard) for shard in shards):
            self.discard()

    def discard(self) -> None:
        if self.is_ours:
            _remove_conversion(self.folder)


@contextmanager
def open_staging(target: Path, identity: str, shards: Sequence[Shard]) -> Iterator[Staging]:
    """Prepare a staging folder, to be published within the block; turns disk errors into sentences.

    Raises UsageError for a place that cannot be written, and DoesNotFit if the disk is or becomes full, after
    removing all of the conversion.
    """
    staging = Staging(target, identity)
    taken = f"another conversion is writing to {staging.folder}: wait for it, or choose another place"
    lock = lock_folder(staging.folder, taken, UsageError)
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
    """Raise UsageError if the destination exists and is not an empty folder.

    With `force`, only if it holds files that qchat did not write.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder: choose another destination")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise UsageError(f"{target} exists: choose another destination, or --force to replace a conversion")
    marker = _read_marker(target) or {}
    files = marker.get("files")
    known = set(files) if isinstance(files, list) else set()
    foreign = sorted(path.name for path in target.iterdir() if path.name not in known)
    if foreign:
        raise UsageError(
            f"{target} holds {foreign[0]}, which no conversion wrote, so --force will not remove it"
        )


def _sibling(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{ending}")


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The report that qchat wrote into a folder of its own, or None."""
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
    """Remove the marker last, so that the remains of a killed run are still recognised as qchat's."""
    if _read_marker(folder) is None:
        return
    for path in folder.iterdir():
        if path.name != REPORT_NAME:
            _remove(path)
    shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    """Flush `folder` to disk, so that a rename in it survives a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
