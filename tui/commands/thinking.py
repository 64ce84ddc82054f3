"""Commands for thoughts: how much the model thinks, and which thoughts are kept and shown."""

# ruff: noqa: ARG002  a command need not use all that commands are given

from typing import TYPE_CHECKING

from ..user.settings import EFFORTS
from .base import Command, Front, choice, starting, whole
from .parameters import set_reply

if TYPE_CHECKING:
    from ..chat.controller import Chat

MODES = ("on", "off", "auto", "show", "hide")
HISTORIES = ("preserve", "strip")
NO_BUDGET = ("off", "none", "default")
MAX_BUDGET = 1 << 22


class Think(Command):
    """Think before answering: on, off, N tokens at most, auto (the model's way); show or hide thoughts."""

    names = ("think", "thinking")
    usage = "[on|off|auto|N|show|hide]"
    while_busy = True
    key = "thinking"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, MODES)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument:
            front.note(described(chat))
        elif argument.isdecimal():
            set_reply(chat, "enable_thinking", True)
            set_budget(chat, argument)
            front.note(described(chat))
        else:
            self._set(chat, front, choice(argument, "thinking", MODES))

    def _set(self, chat: "Chat", front: Front, mode: str) -> None:
        if mode in ("show", "hide"):
            chat.show_thinking = mode == "show"
            front.show_thinking(chat.show_thinking)
        else:
            set_thinking(chat, {"on": True, "off": False, "auto": None}[mode])
        front.note(described(chat))


class Effort(Command):
    """Set how much to think: none and low turn thinking off; models that know them take medium to xhigh."""

    names = ("effort",)
    usage = "[none|low|medium|high|xhigh|default]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, (*EFFORTS, "default"))

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            level = choice(argument, "the effort", (*EFFORTS, "default"))
            set_reply(chat, "reasoning_effort", None if level == "default" else level)
        front.note(described(chat))


class Budget(Command):
    """End each thought after N tokens; off removes the limit."""

    names = ("budget",)
    usage = "[N|off]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, ("off", "256", "1024", "4096"))

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            set_budget(chat, argument)
        front.note(described(chat))


class History(Command):
    """Keep earlier thoughts in the context (preserve) or drop them (strip)."""

    names = ("history",)
    usage = "[preserve|strip]"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, HISTORIES)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            await chat.set_history(choice(argument, "the history", HISTORIES))
        mode = (chat.state or {}).get("history", "not chosen yet")
        what = {"preserve": "stay in the context", "strip": "are dropped from the context"}.get(mode)
        front.note(f"history is {mode}" + (f": earlier thoughts {what}" if what else ""))


def set_thinking(chat: "Chat", on: bool | None) -> None:
    """Turn thinking on or off, None for the model's default; an effort set earlier no longer applies."""
    set_reply(chat, "enable_thinking", on)
    set_reply(chat, "reasoning_effort", None)
    if not on:
        set_reply(chat, "thinking_token_budget", None)


def set_budget(chat: "Chat", text: str) -> None:
    """Set the thinking budget. Raises UsageError unless `text` is a number of tokens or off."""
    off = text.lower() in NO_BUDGET
    set_reply(chat, "thinking_token_budget", None if off else whole(text, "the budget", 0, MAX_BUDGET))


def described(chat: "Chat") -> str:
    """Say what the current settings mean, in a sentence."""
    settings = chat.settings
    on, effort = settings.get("enable_thinking"), settings.get("reasoning_effort")
    budget = settings.get("thinking_token_budget")
    words = [{True: "thinking is on", False: "thinking is off", None: "thinking is as the model does"}[on]]
    if effort:
        words.append(f"effort {effort}")
    if budget is not None:
        words.append(f"at most {budget:,} tokens")
    words.append("thoughts are shown" if chat.show_thinking else "thoughts are folded")
    return ", ".join(words)
