"""Limits on this process's memory below what the machine has: control groups, and `ulimit -v`. Linux only.

A container or a batch system kills a process that exceeds its control group, however much memory is free.
"""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
UNLIMITED_NBYTES = 1 << 60  # version 1 writes a number near 2**63


class GroupFiles(NamedTuple):
    """The files of one version of control groups: limit, usage, and the field of pages to drop at no cost."""

    limit: str
    usage: str
    inactive: str


VERSIONS = {
    1: GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: GroupFiles("memory.max", "memory.current", "inactive_file"),
}


def limited_room(root: Path = ROOT) -> int | None:
    """Return the bytes left within every limit on this process; None where nothing limits it."""
    rooms = [*_group_rooms(root), *_address_rooms(root)]
    return max(0, min(rooms)) if rooms else None


def limit_nbytes(root: Path = ROOT) -> int | None:
    """Return the bytes that this process may take at most; None where nothing limits it."""
    address, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for _, _, limit in _limited_groups(root)]
    limits += [] if address == resource.RLIM_INFINITY else [address]
    return min(limits, default=None)


def _group_rooms(root: Path) -> Iterator[int]:
    """Yield what is left of each control group around this process."""
    for files, folder, limit in _limited_groups(root):
        usage = _number(folder / files.usage)
        if usage is not None:
            yield limit - usage + _field(folder / "memory.stat", files.inactive)


def _limited_groups(root: Path) -> Iterator[tuple[GroupFiles, Path, int]]:
    for version, folder in _groups(root):
        limit = _number(folder / VERSIONS[version].limit)
        if limit is not None and limit < UNLIMITED_NBYTES:
            yield VERSIONS[version], folder, limit


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the version and the folder of this process's control groups, each with those around it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        version, mount = (1, "sys/fs/cgroup/memory") if controllers else (2, "sys/fs/cgroup")
        names = [name for name in path.split("/") if name not in ("", "..")]
        for depth in range(len(names), -1, -1):  # a container sees its own group as the mount itself
            yield version, (root / mount).joinpath(*names[:depth])


def _address_rooms(root: Path) -> Iterator[int]:
    """Yield what is left of the address space that `ulimit -v` allows."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _read(root / "proc/self/statm").split()
    if limit != resource.RLIM_INFINITY and pages:
        yield limit - int(pages[0]) * resource.getpagesize()


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _field(path: Path, name: str) -> int:
    lines = (line.split() for line in _read(path).splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name] and words[1:]), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
