"""The chat's door to the tasks: `/NAME` with the words of `qchat NAME`, run beside the chat.

What the engine does becomes a job: a live block that can be stopped. What this process does itself is shown
when it is done.
"""

import argparse
import asyncio
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks import TASKS, load_task
from ..tasks.base import Door, EngineTask, LocalTask, folder_nbytes, json_report
from ..tasks.models import known_variants
from ..tasks.parsers import HelpRequested, PageParser, action_names, all_actions
from ..tasks.progress import Events
from ..tasks.variants import Variant
from ..text.report import Lines, Report
from ..user.attachments import complete as complete_path
from ..user.paths import user_path
from .base import Command, Front, need_model, starting, turns
from .models import complete_model, resolve

if TYPE_CHECKING:
    from ..chat.controller import Chat

PREFIX = "/"
ROOM = 0.8  # of the memory, for weights; the rest is for what they compute
PATHS = ("FILE", "FOLDER", "CONFIG")  # metavars of words that are paths


class TaskCommand(Command):
    """The command of one of TASKS, which is imported when it is first used."""

    def __init__(self, name: str, *others: str):
        self.names = (name, *others)

    @cached_property
    def task(self) -> EngineTask | LocalTask:
        return load_task(self.name)

    @property
    def help(self) -> str:
        return TASKS[self.name]

    @property
    def usage(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.task.usage

    # a job that would disturb the reply, or unload its model, waits for its end
    while_busy = True

    def parser(self) -> argparse.ArgumentParser:
        """Return the parser of this door."""
        return self.task.parser(PREFIX, PageParser)

    def page(self) -> Report:
        return page_report(self.parser().format_help())

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        before, space, last = argument.rpartition(" ")
        return [before + space + one for one in self._endings(chat, before.split(), last)]

    def _endings(self, chat: "Chat", before: list[str], last: str) -> list[str]:
        """Return what the last word may become."""
        parser = self.parser()
        options = [flag for action in all_actions(parser) for flag in action.option_strings]
        if last.startswith("-"):
            return starting(last, list(dict.fromkeys(options)))
        opened = next(
            (one for one in all_actions(parser) if before and before[-1] in one.option_strings), None
        )
        if opened is not None and opened.choices:
            return starting(last, [str(choice) for choice in opened.choices])
        if opened is not None and opened.metavar in PATHS:
            return complete_path(last, Path.cwd())
        if opened is not None and opened.nargs != 0 and opened.metavar != "MODEL":
            return []
        actions = [] if before else action_names(parser)
        is_model = not actions and (len(before) < self.task.most_models or opened is not None)
        return [*starting(last, actions), *(complete_model(chat, last) if is_model else [])]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument and self.task.screen and front.screen(self.task.screen):
            return
        door = door_of(chat)
        try:
            args = self.task.parse(self.task.chat_words(argument), door)
        except HelpRequested as page:
            front.report(page_report(str(page)))
            return
        if isinstance(self.task, EngineTask):
            await start(self.task, args, door, chat, front)
        else:
            await perform_here(self.task, args, door, front)


def page_report(text: str) -> Report:
    """Return a help page as a report."""
    return Report("", (Lines(text.rstrip().split("\n")),))


def door_of(chat: "Chat") -> Door:
    """Return what the chat provides for its tasks."""
    return Door(
        PREFIX,
        chat.settings["models_dir"],
        in_chat=True,
        model=Path(chat.model.path) if chat.model else None,
        conversation=chat.state.conversation,
        question=next((turn.question for turn in reversed(turns(chat))), ""),
        system=chat.state.system,
        settings=chat.settings.reply(),
        store=chat.store,
    )


async def start(task: EngineTask, args: argparse.Namespace, door: Door, chat: "Chat", front: Front) -> None:
    """Begin the task's job. Raises QchatError."""
    folders = [await chosen(chat, front, name) for name in task.models(args)]
    request = task.request(args, folders, door)
    earlier = [job.result for job in chat.jobs if job.method == request.method and job.result]
    known: list[Variant] = []

    def render(events: Events, value: Mapping[str, Any] | None) -> Report:
        return task.show(events, value, request, as_json=args.json, earlier=earlier, known=known)

    alone = task.memory == "all" or (task.memory == "model" and crowded(chat, *folders))
    chat.start_job(request.title, request.method, request.params, render, alone=alone)
    known += await asyncio.to_thread(known_variants, task, args, door)


async def perform_here(task: LocalTask, args: argparse.Namespace, door: Door, front: Front) -> None:
    """Do the task in a thread, after a question where it has one. Raises QchatError."""
    question = await asyncio.to_thread(task.question, args, door)
    if question and not await front.confirm(question):
        front.note("nothing was changed")
        return
    outcome = await asyncio.to_thread(task.perform, args, door)
    if getattr(args, "json", False):
        front.report(json_report(outcome.value))
        return
    if outcome.report.title or outcome.report.parts:
        front.report(outcome.report)
    for sentence in outcome.notes:
        front.note(sentence)


async def chosen(chat: "Chat", front: Front, name: str) -> Path:
    """Return the folder of a model, by its path or any of its names; by default the loaded one.

    Raises UsageError, ModelError.
    """
    if not name:
        return Path(need_model(chat).path)
    path = user_path(name)
    return path if path.exists() else await resolve(chat, front, name)


def crowded(chat: "Chat", *models: Path) -> bool:
    """Tell whether the largest of `models` lacks room beside the chat's model, or a job has that room."""
    limit = ROOM * chat.status.limit_nbytes
    taken = chat.model.nbytes if chat.model else 0
    return chat.parked or 0 < limit < taken + max(map(folder_nbytes, models))
