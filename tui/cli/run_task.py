"""Runs a task for the command line: in this process, progress on stderr, its report or JSON on stdout."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import UsageError
from ...core.worker.protocol import JOB_METHODS, decode, encode
from ..chat.conversations import open_store
from ..tasks import load_task
from ..tasks.base import Door, EngineTask, JobRequest, LocalTask, json_text
from ..tasks.models import known_variants
from ..tasks.progress import progress_line
from ..text.output import note, write
from ..text.report import Report, report_plain
from ..text.statusline import StatusLine
from ..user.paths import measurements_file, user_path
from ..user.settings import Settings

PREFIX = "qchat "


def run(name: str, argv: Sequence[str]) -> int:
    """Run one of TASKS with the words after its name; returns the exit code. Raises QchatError."""
    task = load_task(name)
    try:
        args = task.parse(argv, Door(PREFIX, ()))
    except SystemExit as end:  # --help has printed
        write(sys.stdout, "")
        return int(end.code or 0)
    settings = Settings.load()
    system = settings.session().get("system")
    door = Door(PREFIX, settings["models_dir"], system=system, settings=settings.reply())
    if isinstance(task, EngineTask):
        return _run_job(task, args, door)
    return _run_here(task, args, door)


def _run_job(task: EngineTask, args: argparse.Namespace, door: Door) -> int:
    folders = [find_folder(name, door) for name in task.models(args)]
    request = task.request(args, folders, door)
    value = _result(task, request)
    if args.json:
        write(sys.stdout, json_text(task.json_value(value)) + "\n")
    else:
        _print(task.show((), value, request, known=known_variants(task, args, door)))
    return 0


def _result(task: EngineTask, request: JobRequest) -> Mapping[str, Any]:
    """Do the job in this process; its result is what would come through the pipe."""
    from ...core import run_job

    params = dict(request.params)
    if "measurements" in JOB_METHODS[request.method]:
        params["measurements"] = str(measurements_file())
    view = JobView()
    try:
        return decode(encode(run_job(request.method, params, view)))
    except KeyboardInterrupt:
        view.clear()
        if task.interrupted:
            note(f"interrupted: {task.interrupted}")
        raise
    finally:
        view.clear()


class JobView:
    """Shows a job's notices as lines on stderr, and its progress as one line there that replaces itself."""

    def __init__(self) -> None:
        self._line = StatusLine()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            self._line.show(progress_line(event))
        elif event["event"] == "notice":
            self.clear()
            note(str(event["text"]))

    def clear(self) -> None:
        self._line.clear()


def _run_here(task: LocalTask, args: argparse.Namespace, door: Door) -> int:
    with ExitStack() as stack:
        if task.needs_store:
            door = replace(door, store=stack.enter_context(open_store()))
        question = task.question(args, door)
        if question and not _confirm(question):
            return 0
        outcome = task.perform(args, door)
    if getattr(args, "json", False):
        write(sys.stdout, json_text(outcome.value) + "\n")
        return 0
    _print(outcome.report)
    for sentence in outcome.notes:
        note(sentence)
    return 0


def find_folder(name: str, door: Door) -> Path:
    """Return the folder of a model on this machine, by any of its names or its path. Raises ModelError."""
    from ...core.hub.library import find_model

    path = user_path(name)
    # a name that is too long for a path makes only pathlib raise
    return path if os.path.exists(path) else find_model(name, door.places)  # noqa: PTH110


def _confirm(question: str) -> bool:
    """Ask on the terminal; anything but y or yes means no. Raises UsageError where there is none."""
    about, _, asked = question.rpartition("\n")
    if not sys.stdin.isatty():
        raise UsageError(f"{about}: can't ask for confirmation without a terminal; --yes does without")
    write(sys.stderr, f"{about}\n{asked} [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _print(report: Report) -> None:
    unicode = "utf" in (sys.stdout.encoding or "").lower()
    write(sys.stdout, report_plain(report, unicode))
