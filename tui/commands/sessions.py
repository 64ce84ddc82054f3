"""Commands for conversations on disk: list, search, open, name, export, import."""

# ruff: noqa: ARG002  a command need not use all that commands are given

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import UsageError
from ..chat.conversations import LATEST, find, when
from ..text.report import Report, Table
from ..user.attachments import complete as complete_path
from ..user.paths import user_path
from .base import Command, Front, first_words, starting, turns

if TYPE_CHECKING:
    from ...core.storage.store import Store
    from ..chat.controller import Chat

LISTED = 20
SUFFIXES = (".md", ".json", ".html")


class Sessions(Command):
    """List conversations; go to one by its number, or find those that hold WORDS."""

    names = ("sessions", "resume", "chat", "continue", "open")
    usage = "[NUMBER|WORDS]"
    key = "sessions"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        if chat.store is None:
            return []
        return starting(argument, [str(one.id) for one in chat.store.conversations(LISTED)])

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        store = need_store(chat)
        if argument == LATEST or argument.removeprefix("#").isdecimal():
            await chat.open(find(store, argument).id)
        elif argument:
            front.report(found(store, argument))
        elif not front.screen("sessions"):
            front.report(listed(store, current(chat)))


class Rename(Command):
    """Give the conversation another title."""

    names = ("rename",)
    usage = "TITLE"
    while_busy = True

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument:
            raise self.wrong("say the new title")
        await chat.rename(first_words(argument, 200))
        front.note(f"this conversation is called {first_words(argument, 200)}")


class Save(Command):
    """Conversations are saved as they go; this names one, and keeps what was read for a quick return."""

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
    """Write the conversation to a file: Markdown, JSON (the whole tree, for /import) or one HTML page."""

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
    """Add a conversation that /export wrote as JSON, and go to it."""

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
        front.note(f"{path.name} is conversation {number} now")


def need_store(chat: "Chat") -> "Store":
    if chat.store is None:
        raise UsageError("conversations are not kept in this run")
    return chat.store


def current(chat: "Chat") -> int | None:
    return chat.state.conversation


def need_conversation(chat: "Chat") -> int:
    """The number of the conversation at hand. Raises UsageError before the first message."""
    need_store(chat)
    number = current(chat)
    if number is None or not turns(chat):
        raise UsageError("nothing was said yet")
    return number


def listed(store: "Store", here: int | None) -> Report:
    """The last conversations."""
    rows = [
        (
            f"{'*' if one.id == here else ' '}{one.id}",
            first_words(one.title) or "-",
            when(one.updated),
            one.model.name,
        )
        for one in store.conversations(LISTED)
    ]
    title = f"Conversations · /sessions NUMBER goes to one · the last {len(rows)}"
    return Report(
        title if rows else "There are no conversations yet", (Table(("", "title", "last", "model"), rows),)
    )


def found(store: "Store", words: str) -> Report:
    """Where the words stand."""
    rows = [
        (str(hit.conversation), first_words(hit.title, 30), hit.snippet)
        for hit in store.search(words, LISTED)
    ]
    title = f"{len(rows)} places with {first_words(words)}" + (
        " · /sessions NUMBER goes there" if rows else ""
    )
    return Report(title, (Table(("", "title", "text"), rows),) if rows else ())


def slug(title: str) -> str:
    """A file's name from a title."""
    return "-".join(re.findall(r"[^\W_]+", title.lower()))[:60].strip("-") or "conversation"
