"""Commands that choose models, and what a model's name in any command means."""

import asyncio
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from ..tasks.models import format_size
from ..tasks.progress import Events, running_report
from ..text.report import Lines, Report
from ..user.attachments import complete as complete_path
from .base import Command, Front, note_other_model, starting

if TYPE_CHECKING:
    from ...core.hub.library import LocalModel, Locations
    from ..chat.controller import Chat

GB = 10**9
NAMES_SECONDS = 10.0


class Model(Command):
    """Choose a model; with NAME load it at once.

    NAME is a folder, a name that /models lists, or a Hugging Face id. The conversation stays; the new model
    reads it when the next message is sent.
    """

    names = ("model",)
    usage = "[NAME]"
    key = "models"

    def runs_at_once(self, argument: str) -> bool:
        return not argument and self.key is not None  # to choose; what is chosen waits

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return complete_model(chat, argument)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument and front.screen("models"):
            return
        options = [] if argument else [(str(one.path), label(one)) for one in known(chat)]
        name = argument.strip("\"'") or await front.choose("Which model?", options)
        if name:
            folder = await resolve(chat, front, name)
            await chat.load(str(folder))
            note_other_model(chat, front)
            if chat.server is not None:
                front.note(chat.server.greeting)
            chat.settings.change("model", str(folder), f"/{self.name}")
            remember(chat, folder)


class Load(Model):
    """Load a model: a folder, a name that /models lists, or a Hugging Face id.

    The conversation stays; the new model reads it when the next message is sent.
    """

    names = ("load",)
    usage = "NAME"
    key = None


def label(model: "LocalModel") -> str:
    """Return a model as a line to choose."""
    return f"{model.name}  {format_size(model.nbytes)}"


def places(chat: "Chat") -> "Locations":
    """Return where the user's models are looked for."""
    from ...core.hub.library import Locations

    return Locations.from_setting(chat.settings["models_dir"])


def known(chat: "Chat") -> "list[LocalModel]":
    from ...core.hub import library

    return library.list_models(places(chat))


def complete_model(chat: "Chat", argument: str) -> list[str]:
    """Return the names and paths that `argument` may become."""
    is_path = "/" in argument or argument.startswith((".", "~"))
    paths = complete_path(argument, Path.cwd()) if is_path else []
    names = _names(tuple(chat.settings["models_dir"]), int(time.monotonic() / NAMES_SECONDS))
    return [*starting(argument, names), *paths]


@lru_cache(maxsize=1)
def _names(folders: tuple[str, ...], _tick: int) -> tuple[str, ...]:
    """Return the names of the models on this machine; called at every key press, so it is cached."""
    from ...core.hub import library

    found = library.list_models(library.Locations.from_setting(folders))
    return tuple(one.name for one in found if one.problem is None)


def remember(chat: "Chat", folder: Path) -> None:
    """Put the model first among the recently used ones, for the next start without a name."""
    from ...core.hub import library

    library.record_use(folder, places(chat))


async def resolve(chat: "Chat", front: Front, name: str) -> Path:
    """Return the model's folder for a path, a name or a Hugging Face id; download it if the user agrees.

    Raises UsageError, ModelError.
    """
    from ...core.hub import library

    try:
        return (await asyncio.to_thread(library.find_model, name, places(chat))).absolute()
    except library.ModelNotDownloaded as missing:
        return await _download(chat, front, missing.id)


async def _download(chat: "Chat", front: Front, id: str) -> Path:
    """Download a model from Hugging Face. Raises UsageError if that is declined or fails, ModelError."""
    from ...core.hub.listing import plan_download

    wanted = await asyncio.to_thread(plan_download, id)
    missing, free = wanted.missing_nbytes / GB, wanted.free_nbytes / GB
    if not await front.confirm(f"Download {id}: {missing:,.2f} GB, of {free:,.0f} GB free on the disk?"):
        raise UsageError(f"{id} was not downloaded")
    params = {"id": id, "revision": None}
    job = chat.start_job(
        f"download {id}", "fetch", params, lambda events, result: downloaded(events, result, id)
    )
    await job.ended()
    if job.result is None:
        raise UsageError(f"{id} was not downloaded" + (f": {job.error}" if job.error else ""))
    return Path(job.result["path"])


def downloaded(events: Events, result: Mapping[str, Any] | None, id: str) -> Report:
    """Say how far a download is, or where the model is now."""
    if result is None:
        return running_report(events)
    return Report("", (Lines((f"{id} is in {result['path']}",), "dim"),))
