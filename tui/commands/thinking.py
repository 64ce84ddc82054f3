"""Commands that set how much the model thinks, which thoughts stay in the context, and which are shown."""

# ruff: noqa: ARG002  a command need not use all that commands are given

from typing import TYPE_CHECKING

from ..user.settings import EFFORTS
from .base import Command, Front, choice, starting, whole
from .parameters import change

if TYPE_CHECKING:
    from ..chat.controller import Chat

MODES = ("on", "off", "auto", "show", "hide")
HISTORIES = ("preserve", "strip")
NO_BUDGET = ("off", "none", "default")
MAX_BUDGET = 1 << 22

EFFORTS_WITHOUT_THOUGHTS = ("none", "low")


class Think(Command):
    """Think before answering: on, off, at most N tokens, auto (the model decides); show or hide thoughts."""

    names = ("think", "thinking")
    confirms = True
    usage = "[on|off|auto|N|show|hide]"
    while_busy = True
    key = "thinking"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, MODES)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            await self._set(chat, front, argument)
        front.note(describe_thinking(chat))

    async def _set(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument.isdecimal():
            chat.settings.change("think", True, "/think")
            set_budget(chat, argument, "/think")
            return
        match choice(argument, "thinking", MODES):
            case "show" | "hide" as mode:
                await change(chat, front, "show_thinking", mode == "show", "/think")
            case mode:
                set_thinking(chat, {"on": True, "off": False, "auto": None}[mode], "/think")


class Effort(Command):
    """Set how much to think: none and low turn thinking off; models that know them take medium to xhigh."""

    names = ("effort",)
    confirms = True
    usage = "[none|low|medium|high|xhigh|default]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, (*EFFORTS, "default"))

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            level = choice(argument, "the effort", (*EFFORTS, "default"))
            chat.settings.change("effort", None if level == "default" else level, "/effort")
        front.note(describe_thinking(chat))


class Budget(Command):
    """End each thought after N tokens; off removes the limit."""

    names = ("budget",)
    confirms = True
    usage = "[N|off]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, ("off", "256", "1024", "4096"))

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            set_budget(chat, argument, "/budget")
        front.note(describe_thinking(chat))


class History(Command):
    """Keep earlier thoughts in the context (preserve) or drop them (strip)."""

    names = ("history",)
    usage = "[preserve|strip]"

    def runs_at_once(self, argument: str) -> bool:
        return not argument

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, HISTORIES)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            await change(chat, front, "history", choice(argument, "the history", HISTORIES), "/history")
        mode = chat.state.history
        what = {"preserve": "stay in the context", "strip": "are dropped from the context"}[mode]
        front.note(f"history is {mode}: earlier thoughts {what}")


def set_thinking(chat: "Chat", on: bool | None, origin: str) -> None:
    """Turn thinking on or off, or leave it to the model with None; resets an effort that might contradict."""
    chat.settings.change("think", on, origin)
    chat.settings.change("effort", None, origin)
    if not on:
        chat.settings.change("thinking_budget", None, origin)


def set_budget(chat: "Chat", text: str, origin: str) -> None:
    """Set the budget of each thought. Raises UsageError for something that is not a number of tokens."""
    off = text.lower() in NO_BUDGET
    budget = None if off else whole(text, "the budget", 0, MAX_BUDGET)
    chat.settings.change("thinking_budget", budget, origin)


def describe_thinking(chat: "Chat") -> str:
    """Describe in a sentence what the settings mean for thinking."""
    settings = chat.settings
    on, effort, budget = settings["think"], settings["effort"], settings["thinking_budget"]
    on = False if effort in EFFORTS_WITHOUT_THOUGHTS else on
    words = [{True: "thinking is on", False: "thinking is off", None: "the model decides about thinking"}[on]]
    if effort:
        words.append(f"effort {effort}")
    if budget is not None:
        words.append(f"at most {budget:,} tokens")
    words.append("thoughts are shown" if settings["show_thinking"] else "thoughts are folded")
    return ", ".join(words)
