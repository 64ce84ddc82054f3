"""Download a model from Hugging Face into the shared cache, or resume a download. ID is owner/name or
owner/name@REVISION, or a prefix of a name that `qchat models` lists."""

import argparse
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ...text.output import write
from ...text.statusline import StatusLine

if TYPE_CHECKING:
    from ....core.hub.download import DownloadProgress
    from ....core.hub.library import Locations, ModelNotDownloaded
    from ....core.hub.listing import DownloadPlan

GB = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a model on Hugging Face")
    parser.add_argument("--yes", action="store_true", help="download without asking")
    parser.add_argument("--dry-run", action="store_true", help="list what would be downloaded")


def run(args: argparse.Namespace) -> int:
    """Download a model and return the exit code. Raises QchatError."""
    from ....core.hub.listing import plan_download

    plan = plan_download(_hub_id(args.id))
    if args.dry_run:
        files = "".join(f"{file.nbytes:>15,}  {file.name}\n" for file in plan.files)
        write(sys.stdout, f"{describe_plan(plan)}\n{files}")
        return 0
    if sys.stdin.isatty() and not args.yes and plan.missing_nbytes:
        plan.check_disk()
        if not confirm(describe_plan(plan), "Download it?"):
            return 0
    write(sys.stdout, f"{download_with_progress(plan)}\n")
    return 0


def find_or_download(name: str, *, yes: bool, places: "Locations | None" = None) -> Path:
    """Return the folder of a model; download it if it is missing and the user agrees.

    Raises ModelNotDownloaded if the user declines or there is no terminal to ask on, and other QchatErrors.
    """
    from ....core.hub import library

    try:
        return library.find_model(name, places)
    except library.ModelNotDownloaded as missing:
        if not yes and not sys.stdin.isatty():
            raise
        return _fetch_if_confirm(missing, yes=yes)


def _fetch_if_confirm(missing: "ModelNotDownloaded", *, yes: bool) -> Path:
    from ....core.hub.listing import plan_download

    plan = plan_download(missing.id)
    plan.check_disk()
    if not yes and not confirm(describe_plan(plan), "It is not on this machine. Download it?"):
        raise missing
    return download_with_progress(plan)


def _hub_id(name: str) -> str:
    """Return the Hugging Face id for an id or the name of a published model."""
    from ....core.hub import library

    return name if library.is_id(name) else library.published_id(name)


def describe_plan(plan: "DownloadPlan") -> str:
    """Return three lines: size, free disk space, and whether the model fits into memory."""
    here = plan.nbytes - plan.missing_nbytes
    resumed = f", {here / GB:.2f} GB already downloaded" if here else ""
    return (
        f"{plan.id}: {plan.nbytes / GB:.2f} GB in {len(plan.files)} files{resumed}\n"
        f"{plan.free_nbytes / GB:.1f} GB are free on the disk of {plan.cache}\n"
        f"{plan.fit.summary}"
    )


def confirm(description: str, question: str) -> bool:
    """Ask on the terminal; anything but y or yes means no."""
    write(sys.stderr, f"{description}\n{question} [y/N] ")
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except UnicodeDecodeError:
        return False


def download_with_progress(plan: "DownloadPlan") -> Path:
    """Download with a progress line on the terminal. Raises QchatError; received bytes are kept."""
    from ....core.hub.download import download_model

    status = StatusLine()
    try:
        return download_model(plan, lambda progress: status.show(progress_line(progress)))
    except KeyboardInterrupt:
        status.clear()
        write(
            sys.stderr,
            "qchat: interrupted; received data is kept: run the same command to resume\n",
        )
        raise
    finally:
        status.clear()


def progress_line(progress: "DownloadProgress") -> str:
    """Format the progress in less than 80 columns."""
    share = progress.done / progress.total if progress.total else 1.0
    left = ""
    if progress.seconds_left is not None:
        left = f", {timedelta(seconds=round(progress.seconds_left))} left"
    return (
        f"{share:4.0%}  {progress.done / GB:.2f} of {progress.total / GB:.2f} GB{left}  {progress.detail:.40}"
    )
