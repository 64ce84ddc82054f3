"""Fetch a model from Hugging Face into the cache that all tools share, or the rest of one that was begun. ID
is owner/name, with @REVISION if wanted, or the beginning of a name that `qchat models` lists."""

import argparse
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ...text.output import write
from ...text.statusline import StatusLine

if TYPE_CHECKING:
    from ....core.hub.fetch import Fetch, Progress
    from ....core.hub.library import NotHere, Places

GB = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a model on Hugging Face")
    parser.add_argument("--yes", action="store_true", help="fetch without asking")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and end")


def run(args: argparse.Namespace) -> int:
    """Fetch; returns the exit code. Raises QchatError."""
    from ....core.hub import fetch as hub

    wanted = hub.plan(_id(args.id))
    if args.dry_run:
        files = "".join(f"{file.nbytes:>15,}  {file.name}\n" for file in wanted.files)
        write(sys.stdout, f"{described(wanted)}\n{files}")
        return 0
    if sys.stdin.isatty() and not args.yes and wanted.missing_nbytes:
        wanted.check_disk()
        if not agreed(described(wanted), "Fetch it?"):
            return 0
    write(sys.stdout, f"{fetched(wanted)}\n")
    return 0


def obtain(name: str, *, yes: bool, places: "Places | None" = None) -> Path:
    """The folder of the model called `name`, fetched where it is not here and the user agrees.

    Raises NotHere where nobody can be asked and nothing was agreed to, other QchatErrors as finding and
    fetching do.
    """
    from ....core.hub import library

    try:
        return library.find(name, places)
    except library.NotHere as missing:
        if not yes and not sys.stdin.isatty():
            raise
        return _fetch_if_agreed(missing, yes=yes)


def _fetch_if_agreed(missing: "NotHere", *, yes: bool) -> Path:
    from ....core.hub import fetch as hub

    wanted = hub.plan(missing.id)
    wanted.check_disk()
    if not yes and not agreed(described(wanted), "It is not on this machine. Fetch it?"):
        raise missing
    return fetched(wanted)


def _id(name: str) -> str:
    """Of the hub, for an id or the name of a published model."""
    from ....core.hub import library

    return name if library.is_id(name) else library.known_id(name)


def described(wanted: "Fetch") -> str:
    """Size, free disk, and what will fit, in three lines."""
    here = wanted.nbytes - wanted.missing_nbytes
    begun = f", {here / GB:.2f} GB of it here already" if here else ""
    return (
        f"{wanted.id}: {wanted.nbytes / GB:.2f} GB in {len(wanted.files)} files{begun}\n"
        f"{wanted.free_nbytes / GB:.1f} GB are free on the disk of {wanted.cache}\n"
        f"{wanted.fit.sentence}"
    )


def agreed(description: str, question: str) -> bool:
    """Ask on the terminal; anything but a yes is a no."""
    write(sys.stderr, f"{description}\n{question} [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def fetched(wanted: "Fetch") -> Path:
    """Fetch with a line of progress on the terminal. Raises QchatError; what arrived is kept in any case."""
    from ....core.hub import fetch as hub

    status = StatusLine()
    try:
        return hub.fetch(wanted, lambda progress: status.show(progress_line(progress)))
    except KeyboardInterrupt:
        status.clear()
        write(
            sys.stderr, "qchat: interrupted; what arrived is kept, and the same command goes on from there\n"
        )
        raise
    finally:
        status.clear()


def progress_line(progress: "Progress") -> str:
    """In less than 80 columns."""
    share = progress.done / progress.total if progress.total else 1.0
    left = ""
    if progress.seconds_left is not None:
        left = f", {timedelta(seconds=round(progress.seconds_left))} left"
    return (
        f"{share:4.0%}  {progress.done / GB:.2f} of {progress.total / GB:.2f} GB{left}  {progress.detail:.40}"
    )
