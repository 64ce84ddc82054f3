"""The slash commands, in one table from which both front ends, help, palette and README are made.

Sorted by how often they are used. Decides whether a submitted line is a command, a mistake or a message.
"""

# ruff: noqa: ARG002  a command need not use all that commands are given

from collections.abc import Awaitable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import QchatError, UsageError
from ..chat.client import EngineDied
from ..tasks import TASKS
from ..text.report import Lines, Report, Table
from . import (
    conversation,
    diff,
    models,
    persona,
    probs,
    prompts,
    serve,
    sessions,
    settings,
    stats,
    thinking,
    tools,
    view,
)
from .base import Command, Front, starting
from .task_command import TaskCommand

if TYPE_CHECKING:
    from ..chat.controller import Chat

__all__ = [
    "COMMANDS",
    "Command",
    "Completion",
    "Front",
    "completions",
    "confirms",
    "help_report",
    "hint",
    "parse",
    "perform",
]


class Help(Command):
    """List the commands, or show how one of them is used."""

    names = ("help", "?")
    usage = "[COMMAND]"
    while_busy = True
    key = "help"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument.removeprefix("/"), [command.name for command in COMMANDS])

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            front.report(named(argument).page())
        elif not front.screen("help"):
            front.report(help_report())


# tasks whose commands do something of their own besides
OWN_COMMANDS = ("sessions", "bench")
HELP_FLAGS = ("-h", "--help")
COMMANDS: tuple[Command, ...] = (
    Help(),
    models.Model(),
    models.Load(),
    conversation.New(),
    conversation.Retry(),
    conversation.Edit(),
    conversation.Undo(),
    thinking.Think(),
    view.Copy(),
    view.Stop(),
    view.Read(),
    view.Paste(),
    conversation.Fork(),
    conversation.Switch(),
    conversation.Rewind(),
    settings.System(),
    persona.Persona(),
    prompts.Prompts(),
    settings.Schema(),
    settings.Set(),
    settings.Show(),
    stats.Stats(),
    probs.Probs(),
    diff.DiffCommand(),
    sessions.SessionsCommand(),
    thinking.Effort(),
    thinking.Budget(),
    thinking.History(),
    conversation.Cache(),
    conversation.Results(),
    conversation.Compact(),
    sessions.Rename(),
    sessions.Save(),
    sessions.Export(),
    sessions.Import(),
    view.Find(),
    *(TaskCommand(name) for name in TASKS if name not in OWN_COMMANDS),
    tools.Tools(),
    stats.Bench(),
    serve.Serve(),
    view.Theme(),
    view.Keys(),
    view.Panes(),
    view.Mouse(),
    view.Plain(),
    view.Log(),
    view.About(),
    view.Bye(),
)
BY_NAME = {name: command for command in COMMANDS for name in command.names}
FAREWELLS = ("exit", "quit")


@dataclass(frozen=True)
class Completion:
    """One completion: the completed line, what the list shows, and its help."""

    line: str
    shown: str
    help: str = ""


def parse(line: str) -> str | tuple[Command, str]:
    """Return a command with its argument, or the message for the model.

    A path that exists is a message, and so is a line that begins with a space. Raises UsageError for an
    unknown command, which never reaches the model.
    """
    if line.strip() in FAREWELLS:
        return BY_NAME["bye"], ""
    if not line.startswith("/"):
        return line
    word, *rest = line[1:].split(None, 1) if line[1:2].strip() else [""]
    if word and word.lower() not in BY_NAME and _is_path(f"/{word}"):
        return line
    return named(word), "".join(rest).strip()


def confirms(line: str) -> bool:
    """Whether the line is a command whose notes only confirm a choice."""
    try:
        asked = parse(line)
    except UsageError:
        return False
    return not isinstance(asked, str) and asked[0].confirms


def named(word: str) -> Command:
    """Find a command by its name or a unique prefix. Raises UsageError that names the nearest."""
    name = word.removeprefix("/").lower()
    if name in BY_NAME:
        return BY_NAME[name]
    begun = dict.fromkeys(command for known, command in BY_NAME.items() if name and known.startswith(name))
    if len(begun) == 1:
        return next(iter(begun))
    if begun:
        raise UsageError(
            f"/{name} may be {', '.join(f'/{command.name}' for command in begun)}: write more of it"
        )
    near = get_close_matches(name, BY_NAME, 1)
    hint = f"did you mean /{near[0]}?" if near else "/help lists them."
    raise UsageError(f"there is no command /{name:.40}; {hint} Start with a space to send it as a message.")


def _is_path(word: str) -> bool:
    try:
        return Path(word).exists()
    except (OSError, ValueError):
        return False


async def perform(line: str, chat: "Chat", front: Front) -> None:
    """Run a submitted line, or queue it behind what runs; an error is shown as one sentence."""
    await _with_errors_shown(_perform(line, chat, front), line, chat, front)


async def _perform(line: str, chat: "Chat", front: Front) -> None:
    asked = parse(line)
    if isinstance(asked, str):
        if asked.strip():
            await chat.send(asked.strip())
        return
    command, argument = asked
    if argument in HELP_FLAGS:
        front.report(command.page())
        return
    if argument and not command.usage:
        raise UsageError(f"/{command.name} takes no words")
    if chat.has_turns_to_come and not command.runs_at_once(argument):
        await _line_up(command, argument, chat, front)
    else:
        await command.run(chat, front, argument)


async def _line_up(command: Command, argument: str, chat: "Chat", front: Front) -> None:
    """Queue a command, after its questions to the user."""
    settled = await command.settle(chat, front, argument)
    if settled is None:
        return
    line = f"/{command.name} {settled}".strip()

    async def work() -> None:
        await _with_errors_shown(command.run(chat, front, settled), line, chat, front)

    chat.line_up(line, work)


async def _with_errors_shown(work: Awaitable[None], line: str, chat: "Chat", front: Front) -> None:
    try:
        await work
    except EngineDied as error:
        if str(error) not in chat.status.reason:  # else the chat has told of it
            front.note(str(error), "error")
    except QchatError as error:
        front.note(str(error), "error")
    except OSError as error:
        front.note(f"{error.filename or line:.200}: {error.strerror or error}", "error")


def completions(line: str, chat: "Chat") -> list[Completion]:
    """Return the completions of a begun command line, most used first."""
    if not line.startswith("/") or "\n" in line:
        return []
    word, space, argument = line[1:].partition(" ")
    if space:
        command = BY_NAME.get(word.lower())
        found = command.complete(chat, argument) if command else []
        return [Completion(f"/{word} {one}", one) for one in found if one != argument]
    found = [(command, _name_begun(command, word.lower())) for command in COMMANDS]
    return [
        Completion(f"/{name}{' ' * bool(command.usage)}", f"/{name} {command.usage}".strip(), command.help)
        for command, name in found
        if name
    ]


def _name_begun(command: Command, word: str) -> str | None:
    return next((name for name in command.names if name.startswith(word)), None)


def hint(line: str) -> str:
    """Return the usage of a command without an argument so far; empty otherwise."""
    word, space, argument = line.removeprefix("/").partition(" ")
    command = BY_NAME.get(word.lower()) if line.startswith("/") else None
    if command is None or argument.strip() or not command.usage:
        return ""
    return command.usage if space else f" {command.usage}"


def help_report(keys: dict[str, str] | None = None) -> Report:
    """List every command, with the key that does the same; `keys` are by action id."""
    known = keys or {}
    rows = [
        (f"/{command.name} {command.usage}".strip(), known.get(command.key or "", ""), command.help)
        for command in COMMANDS
    ]
    columns = ("command", "key" if keys else "", "what it does")
    said = "Begin with a space to say something that starts with a slash; @PATH attaches a text file."
    return Report("Commands", (Table(columns, rows, named=False), Lines((said,), "dim")))


def markdown_table() -> str:
    """Return the commands as tui/README.md lists them."""
    rows = ["| command | what it does |", "|---|---|"]
    for command in COMMANDS:
        others = "".join(f", `/{name}`" for name in command.names[1:])
        usage = f"{command.name} {command.usage}".strip().replace("|", "\\|")
        rows.append(f"| `/{usage}`{others} | {command.help} |")
    return "\n".join(rows) + "\n"
