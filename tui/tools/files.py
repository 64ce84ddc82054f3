"""Files below the working folder, for the model: read, listed, searched.

No link leads out of the folder. Sizes, numbers of files and times are bounded. Searches with ripgrep where it
is installed, which also honours .gitignore.
"""

import asyncio
import fnmatch
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from .base import ToolError
from .processes import run_program

MAX_FILE_NBYTES = 4 << 20
MAX_LINES = 2000
MAX_FILES = 500  # that are listed, or lines that are found
MAX_WALKED = 20_000
SEARCH_SECONDS = 20.0
MAX_COLUMNS = 300
SKIPPED = (".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv")


def locate(path: str, folder: Path) -> Path:
    """Return the real place of `path` below `folder`. Raises ToolError for one outside or missing."""
    try:
        root = folder.resolve(strict=True)
        place = (root / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "it is no path"
        raise ToolError(f"{path:.200} cannot be read: {why}") from None
    if not place.is_relative_to(root):
        raise ToolError(f"{path:.200} lies outside of the working folder, where nothing may be read")
    return place


def read_lines(path: str, folder: Path, first: int, count: int) -> str:
    """Return lines of a text file below `folder`, from number `first`. Raises ToolError."""
    if first < 1 or not 1 <= count <= MAX_LINES:
        raise ToolError(f"first_line begins at 1, and lines is 1 to {MAX_LINES:,}")
    data = _read(locate(path, folder), path)
    if b"\0" in data:
        raise ToolError(f"{path:.200} is not a text file")
    lines = data.decode("utf-8", errors="replace").split("\n")
    chosen = lines[first - 1 : first - 1 + count]
    if not chosen:
        raise ToolError(f"{path:.200} has {len(lines):,} lines")
    rest = len(lines) - (first - 1 + len(chosen))
    return "\n".join([*chosen, f"[{rest:,} more lines]"] if rest else chosen)


def _read(place: Path, path: str) -> bytes:
    """Read a regular file, which is not waited for and not followed if it became a link meanwhile."""
    try:
        number = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            about = os.fstat(number)
            if not stat.S_ISREG(about.st_mode):
                raise ToolError(f"{path:.200} is not a regular file")
            if about.st_size > MAX_FILE_NBYTES:
                raise ToolError(f"{path:.200} is larger than {MAX_FILE_NBYTES >> 20} MiB")
            return file.read(MAX_FILE_NBYTES)
    except OSError as error:
        raise ToolError(f"{path:.200} cannot be read: {error.strerror}") from None


async def find(folder: Path, below: str, glob: str, text: str) -> str:
    """Return the files below `below` whose names match `glob`, or their lines that hold `text`.

    Raises ToolError.
    """
    place = locate(below or ".", folder)
    if not place.is_dir():
        raise ToolError(f"{below:.200} is not a folder")
    if program := shutil.which("rg"):
        found = await _with_ripgrep(program, folder.resolve(), place, glob, text)
    else:
        found = await asyncio.to_thread(lambda: list(_walk(folder.resolve(), place, glob, text)))
    if not found:
        return "nothing was found"
    more = [f"[only the first {MAX_FILES} are shown]"] if len(found) > MAX_FILES else []
    return "\n".join([*(line[:MAX_COLUMNS] for line in found[:MAX_FILES]), *more])


async def _with_ripgrep(program: str, root: Path, place: Path, glob: str, text: str) -> list[str]:
    named = ["--glob", glob] if glob else []
    what = ["--line-number", "--no-heading", "--fixed-strings", "--regexp", text] if text else ["--files"]
    where = f"./{place.relative_to(root)}"
    command = [program, "--no-config", "--color=never", "--sort=path", *named, *what, "--", where]
    done = await run_program(command, root, SEARCH_SECONDS)
    if done.code is None:
        raise ToolError(f"the search took longer than {SEARCH_SECONDS:.0f} s")
    if done.code > 1:
        raise ToolError(f"ripgrep refused: {' '.join(done.output.split())[:300]}")
    return [line.removeprefix("./").removeprefix("./") for line in done.output.splitlines()]


def _walk(root: Path, place: Path, glob: str, text: str) -> Iterator[str]:
    """Yield what ripgrep would, but for what .gitignore excludes."""
    walked = found = 0
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(names):
            walked += 1
            path = Path(folder, name)
            shown = str(path.relative_to(root))
            if found > MAX_FILES or walked > MAX_WALKED:
                return
            if glob and not (fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(shown, glob)):
                continue
            for line in _matches(path, shown, text) if text else (shown,):
                found += 1
                yield line


def _matches(path: Path, shown: str, text: str) -> Iterator[str]:
    try:
        data = b"" if path.is_symlink() else _read(path, shown)
    except ToolError:
        return
    if b"\0" in data:
        return
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        if text in line:
            yield f"{shown}:{number}:{line}"
