"""Commands for the screen and beyond: copy, find, attach files, themes, keys, the mouse, the log, leaving."""

# ruff: noqa: ARG002  a command need not use all that commands are given

import asyncio
import platform
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from .. import __version__
from ..tasks.words import words
from ..text.report import Lines, Report, Table
from ..user import clipboard
from ..user.attachments import complete as complete_path
from ..user.attachments import mention, read
from ..user.keymap import Keymap
from ..user.paths import state_dir, user_path
from ..user.settings import PANE_NAMES, save
from .base import Command, Front, choice, plural, starting, switch, turns, whole
from .parameters import change
from .sessions import need_store

if TYPE_CHECKING:
    from ...core.worker.wire import ModelInfo
    from ..chat.controller import Chat

MAX_FILES = 100
LOG_LINES = 40


class Copy(Command):
    """Copy the last answer, answer N, a code block of the last answer (the last one, or N), or everything."""

    names = ("copy",)
    confirms = True
    usage = "[N|code [N]|all]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, ["code", "all", *(str(turn.number) for turn in reversed(turns(chat)))])

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        front.note(front.copy(self._chosen(chat, argument.split())))

    def _chosen(self, chat: "Chat", given: list[str]) -> str:
        answers = [turn.answer for turn in turns(chat)]
        if not answers:
            raise UsageError("there is no answer yet")
        match given:
            case []:
                return answers[-1]
            case ["all"]:
                return "\n\n".join(f"> {turn.question}\n\n{turn.answer}" for turn in turns(chat))
            case ["code", *which] if len(which) < 2:
                return _block(answers[-1], which[0] if which else None)
            case [number]:
                return answers[whole(number, "the answer", 1, len(answers)) - 1]
        raise self.wrong(f"{' '.join(given)!r:.40} cannot be copied")


def _block(answer: str, number: str | None) -> str:
    from ..text.markdown.parser import code_blocks

    blocks = [block.text for block in code_blocks(answer)]
    if not blocks:
        raise UsageError("the last answer has no code block")
    return blocks[-1] if number is None else blocks[whole(number, "the code block", 1, len(blocks)) - 1]


class Read(Command):
    """Attach text files to the next message, by path or pattern; @PATH in a message does the same."""

    names = ("read",)
    usage = "PATH|PATTERN ..."
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        before, space, last = argument.rpartition(" ")
        return [before + space + path for path in complete_path(last, Path.cwd())]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        paths = list(dict.fromkeys(path for word in words(argument) for path in _matching(word)))
        if not paths:
            raise self.wrong("say which files")
        if len(paths) > MAX_FILES:
            raise UsageError(f"{len(paths):,} files match, at most {MAX_FILES} can be attached")
        size = sum(len(read(path, Path.cwd()).text) for path in paths)
        front.put_prompt(" ".join(map(mention, paths)) + " ")
        front.note(f"{plural(len(paths), 'file')} with {size:,} characters will go with the message")


class Paste(Command):
    """Attach the picture on the clipboard to the next message."""

    names = ("paste",)
    while_busy = True

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        path = await asyncio.to_thread(clipboard.picture, state_dir() / "pasted")
        front.put_prompt(f"{mention(str(path))} ")
        front.note("the clipboard's picture will go with the message")


def _matching(word: str) -> list[str]:
    """Return the files that a word names. Raises UsageError for a pattern without matches."""
    if not any(sign in word for sign in "*?[") or user_path(word).exists():
        return [word]
    found = sorted(path for path in _glob(word) if Path(path).is_file())
    if not found:
        raise UsageError(f"no file matches {word}")
    return found


def _glob(word: str) -> list[str]:
    # Path.glob refuses absolute patterns
    return glob(str(user_path(word)) if word.startswith("~") else word, recursive=True)  # noqa: PTH207


class Find(Command):
    """Find TEXT in the conversation on the screen; /sessions WORDS searches all conversations."""

    names = ("find",)
    confirms = True
    usage = "TEXT"
    while_busy = True
    key = "find"

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument:
            raise self.wrong("say what to find")
        count = front.find(argument)
        matches = "1 match" if count == 1 else f"{count:,} matches" if count else "no matches"
        elsewhere = "" if count else " · /sessions and the words search all conversations"
        front.note(f"{matches} for {argument!r:.60}{elsewhere}")


class Theme(Command):
    """Choose the colour theme; without NAME preview the themes."""

    names = ("theme",)
    confirms = True
    usage = "[NAME]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, theme_names())

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            name = choice(argument, "the theme", theme_names())
            await change(chat, front, "theme", name, "/theme")
        elif not front.screen("theme"):
            front.report(Report("Themes", (Lines(theme_names()),)))


def theme_names() -> list[str]:
    from ..user.themes import Shelf

    return ["auto", *Shelf.open().looks]


class Keys(Command):
    """Show what each key does, and the action names that [keys] in the settings uses."""

    names = ("keys",)
    while_busy = True
    key = "keys"

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not front.screen("keys"):
            keys = Keymap()
            front.report(Report("Keys", (Table(("key", ""), keys.rows()), Table(("action", ""), keys.ids()))))


class Panes(Command):
    """Show or hide the live panes, or one of them: speed, memory, context, thinking, branches.

    Wide windows show them beside the conversation, others as a strip below it. What is shown is remembered
    in your settings.
    """

    names = ("panes",)
    confirms = True
    usage = "[NAME|on|off]"
    while_busy = True
    key = "panes"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, (*PANE_NAMES, "on", "off"))

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        word = choice(argument, "the pane", (*PANE_NAMES, "on", "off")) if argument else ""
        front.note(toggle_panes(chat, front, word, "/panes"))


def toggle_panes(chat: "Chat", front: Front, word: str, origin: str) -> str:
    """Show or hide a pane, or all of them with "on", "off" or nothing; save that and return it in words.

    A pane that is asked for while all are hidden is shown alone. Raises UsageError.
    """
    settings = chat.settings
    shown, names = settings["panes"], list(settings["shown_panes"])
    if word in PANE_NAMES:
        kept = names if shown else []
        names = [one for one in PANE_NAMES if (one in kept) != (one == word)]
        shown = bool(names)
    else:
        shown = word == "on" or (not word and not shown)
    if not front.show_panes(names if shown else ()):
        raise UsageError(f"{origin}: only the full-screen app has panes")
    changed: dict[str, Any] = {"panes": shown}
    if word in PANE_NAMES:
        changed["shown_panes"] = names or list(PANE_NAMES)
    for name, value in changed.items():
        settings.change(name, value, origin)
        save(name, value)
    return f"panes: {', '.join(names)}" if shown else "the panes are hidden"


class Mouse(Command):
    """Turn mouse support on, or leave the mouse to the terminal."""

    names = ("mouse",)
    confirms = True
    usage = "on|off"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, ("on", "off"))

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        await change(chat, front, "mouse", switch(argument, "the mouse"), "/mouse")


class Plain(Command):
    """Continue the same conversation line by line, with the same engine; off returns to the full screen."""

    names = ("plain",)
    usage = "[off]"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, ("off",))

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument not in ("", "off"):
            raise self.wrong(f"{argument!r:.40} is not understood")
        await front.leave("full" if argument else "plain")


class Stop(Command):
    """Stop the reply, or the newest job if there is none."""

    names = ("stop", "cancel")
    while_busy = True
    key = "stop"

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if chat.busy or chat.running_jobs:
            chat.stop()
        else:
            front.note("nothing is running")


class Log(Command):
    """Show the last lines of the engine's log, which is never written to a file."""

    names = ("log",)
    while_busy = True

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        front.report(log_report(chat))


def log_report(chat: "Chat") -> Report:
    lines = list(chat.log)[-LOG_LINES:]
    return Report("Log", (Lines(lines or ("the log is empty",)),))


class About(Command):
    """Show versions, the model, where files are kept, and which forms of operations are in use."""

    names = ("about",)
    while_busy = True

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        from ..user.paths import config_file

        limit = chat.status.limit_nbytes
        rows = [
            ("qchat", __version__),
            ("MLX", mlx_version()),
            ("Python", f"{platform.python_version()} on {platform.platform()}"),
            (
                "memory limit",
                f"{limit / 10**9:.1f} GB" if limit else "-",
            ),
            ("model", describe_model(chat.model) if chat.model else "none"),
            ("model folder", chat.model.path if chat.model else "none"),
            ("settings", str(config_file())),
            ("conversations", str(need_store(chat).path) if chat.store else "not kept"),
        ]
        chosen = [*chat.model.forms.items()] if chat.model else []
        parts = [Table(("", ""), rows), *([Table(("operation", "form in use"), chosen)] if chosen else [])]
        front.report(Report("qchat", tuple(parts)))


def mlx_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mlx")
    except PackageNotFoundError:
        return "not installed"


def describe_model(model: "ModelInfo") -> str:
    """Return a model's name, size and bits per weight."""
    return f"{model.name}, {model.nbytes / 10**9:,.2f} GB, {model.bits_per_weight:.2f} bits per weight"


class Bye(Command):
    """Quit, as do exit and quit without a slash. qchat -c returns to this conversation."""

    names = ("bye", "exit", "quit")
    while_busy = True
    key = "quit"

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        await front.leave("shell")
