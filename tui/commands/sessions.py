"""Commands for stored conversations: open, name, save, export, import."""

# ruff: noqa: ARG002  a command need not use all that commands are given

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import UsageError
from ..chat.conversations import LATEST, find
from ..tasks.parsers import action_names
from ..user.attachments import complete as complete_path
from ..user.paths import user_path
from .base import Command, Front, first_words, note_other_model, starting, turns
from .task_command import TaskCommand

if TYPE_CHECKING:
    from ...core.storage.store import Store
    from ..chat.controller import Chat

LISTED = 20
SUFFIXES = (".md", ".json", ".html")


class SessionsCommand(TaskCommand):
    """The task `sessions`, and ways to go to a conversation that only a chat has."""

    key = "sessions"

    def __init__(self) -> None:
        super().__init__("sessions", "resume", "chat", "continue", "open")

    def runs_at_once(self, argument: str) -> bool:
        return not _names_one(argument)

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        known = chat.store.conversations(LISTED) if chat.store is not None else []
        return [*super().complete(chat, argument), *starting(argument, [str(one.id) for one in known])]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        store = need_store(chat)
        first = argument.split(maxsplit=1)[0] if argument else ""
        if _names_one(argument):
            await chat.open(find(store, argument).id)
            note_other_model(chat, front)
        elif argument and first not in action_names(self.parser()) and not first.startswith("-"):
            await super().run(chat, front, shlex.join(["search", "--", argument]))
        else:
            await super().run(chat, front, argument)
            if first == "rename":
                await _follow_rename(chat, store)


def _names_one(argument: str) -> bool:
    """Whether a conversation is named that shall be opened."""
    return argument == LATEST or argument.removeprefix("#").isdecimal()


async def _follow_rename(chat: "Chat", store: "Store") -> None:
    """Give the engine, which keeps a title of its own, the one that the store has."""
    number = current(chat)
    if number is not None and chat.model is not None:
        title = store.conversation(number).title
        if title != chat.state.title:
            await chat.rename(title)


class Rename(Command):
    """Rename the conversation."""

    names = ("rename",)
    confirms = True
    usage = "TITLE"
    while_busy = True

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument:
            raise self.wrong("say the new title")
        await chat.rename(first_words(argument, 200))
        front.note(f"this conversation is called {first_words(argument, 200)}")


class Save(Command):
    """Save the prompt cache, so that this conversation reopens at once; TITLE also renames it."""

    names = ("save",)
    usage = "[TITLE]"
    while_busy = True

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        number = need_conversation(chat)
        if argument:
            await chat.rename(first_words(argument, 200))
        await chat.request("save_state")
        front.note(f"saved as conversation {number}; /sessions {number} returns to it")


class Export(Command):
    """Export the conversation as Markdown, HTML, or JSON (the whole tree, for /import)."""

    names = ("export",)
    usage = "[FILE.md|.json|.html]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return complete_path(argument, Path.cwd()) or [
            f"{argument}{suffix}" for suffix in SUFFIXES if argument
        ]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        from ...core import export_conversation

        store, number = need_store(chat), need_conversation(chat)
        path = user_path(argument or f"{slug(chat.state.title)}.md")
        if path.suffix.lower() not in SUFFIXES:
            raise self.wrong(
                f"cannot export to {path.name}, wanted a name that ends with {', '.join(SUFFIXES)}"
            )
        taken = path.exists()
        if taken and not await front.confirm(f"{path} exists already. Replace it?"):
            front.note("nothing was written")
            return
        export_conversation(store, number, path, overwrite=taken)
        front.note(f"written to {path}")


class Import(Command):
    """Import a conversation that /export wrote as JSON, and open it."""

    names = ("import",)
    usage = "FILE.json"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return complete_path(argument, Path.cwd())

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        from ...core import import_conversation

        if not argument:
            raise self.wrong("say which file")
        path = user_path(argument)
        number = import_conversation(need_store(chat), path)
        await chat.open(number)
        note_other_model(chat, front)
        front.note(f"{path.name} is conversation {number} now")


def need_store(chat: "Chat") -> "Store":
    if chat.store is None:
        raise UsageError("conversations are not kept in this run")
    return chat.store


def current(chat: "Chat") -> int | None:
    return chat.state.conversation


def need_conversation(chat: "Chat") -> int:
    """Return the current conversation's number. Raises UsageError before the first message."""
    need_store(chat)
    number = current(chat)
    if number is None or not turns(chat):
        raise UsageError("nothing was said yet")
    return number


def slug(title: str) -> str:
    """Return a file name made from a title."""
    return "-".join(re.findall(r"[^\W_]+", title.lower()))[:60].strip("-") or "conversation"
