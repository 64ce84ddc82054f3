"""Commands that set and show: the system prompt, settings, the model's facts, statistics."""

# ruff: noqa: ARG002  a command need not use all that commands are given

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from ..text.report import Lines, Report, Spark, Table
from ..user.attachments import complete as complete_path
from ..user.attachments import read
from ..user.paths import config_file
from ..user.settings import KEYS, Choice, Flag
from .base import Command, Front, choice, need_model, starting, turns
from .parameters import ALIASES, OF_REPLIES, in_force, key_called, set_reply, shown
from .thinking import described, set_thinking

if TYPE_CHECKING:
    from ..chat.controller import Chat

GIB = 2**30
DEFAULT = "default"
SWITCHES = ("think", "nothink", "verbose", "quiet")
# what is asked for only when a model is loaded, and only when the program starts
AT_LOAD = ("context_limit", "snapshot_budget", "kv_bits")
AT_START = ("measure", "plain", "screen_reader", "keys")
SUBJECTS = ("info", "model", "parameters", "system", "template", "prompt", "config")


class System(Command):
    """Set the system prompt, from a file with @FILE; "" has none; without words show it."""

    names = ("system",)
    usage = '[TEXT|@FILE|""]'

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        if not argument.startswith("@"):
            return []
        return [f"@{path}" for path in complete_path(argument[1:], Path.cwd())]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument:
            front.report(system_report(chat))
            return
        text = read(argument[1:], Path.cwd()).text if argument.startswith("@") else argument
        text = text.strip().removeprefix('"""').removesuffix('"""').strip()
        await chat.set_system(None if text in ("", '""') else text)
        front.note("the system prompt holds from the next question; what was said is read again under it")


class Set(Command):
    """Set something from now on: /set temperature 0.7, /set think off; default leaves it to the model.

    Ollama's words are understood: /set parameter NAME VALUE, /set think, /set nothink, /set system TEXT,
    /set verbose, /set quiet.
    """

    names = ("set",)
    usage = "NAME VALUE"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        lead = "parameter " if argument.startswith("parameter ") else ""
        name, space, value = argument.removeprefix(lead).partition(" ")
        if not space:
            known = (*OF_REPLIES, "num_ctx") if lead else ("parameter", *SWITCHES, *KEYS)
            return [lead + one for one in starting(name, tuple(dict.fromkeys(known))) if one not in AT_START]
        return [f"{lead}{name} {one}" for one in starting(value, _values(name))]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument:
            front.report(parameters_report(chat))
            return
        name, _, value = argument.partition(" ")
        if name == "parameter":
            name, _, value = value.strip().partition(" ")
            if not name:
                raise self.wrong("say which parameter")
        elif name in SWITCHES and not value:
            self._switch(chat, front, name)
            return
        await self._set(chat, front, name, value.strip())

    def _switch(self, chat: "Chat", front: Front, name: str) -> None:
        if name in ("think", "nothink"):
            set_thinking(chat, name == "think")
            front.note(described(chat))
            return
        chat.show_stats = name == "verbose"
        front.note("each reply ends with its figures" if chat.show_stats else "replies end without figures")

    async def _set(self, chat: "Chat", front: Front, name: str, text: str) -> None:
        key = key_called(name, "/set")
        if key.name in AT_START:
            where = f"`qchat config edit` sets it in {config_file()}"
            raise UsageError(f"/set {key.name}: it counts only when qchat starts; {where}")
        usual = None if key.reply else key.default
        if not text:
            raise UsageError(f"/set {key.name}: say the value, wanted {key.kind.wanted}")
        value = usual if text == DEFAULT else key.parsed(text, "/set")
        if key.reply:
            set_reply(chat, key.reply, value)
            front.note(f"{key.name} is {shown(value)} from the next reply")
        elif key.name in _ELSEWHERE:
            await _ELSEWHERE[key.name](chat, front, value)
        else:
            chat.set_option(key.name, value)
            since = "from the next /load" if key.name in AT_LOAD else "now"
            front.note(f"{key.name} is {shown(value)} {since}")


async def _set_system(chat: "Chat", front: Front, value: Any) -> None:
    await System().run(chat, front, value or '""')


async def _set_history(chat: "Chat", front: Front, value: Any) -> None:
    await chat.set_history(value or "preserve")
    front.note(f"history is {chat.state.get('history')}")


async def _set_theme(_chat: "Chat", front: Front, value: Any) -> None:
    front.set_theme(value or "auto")


async def _set_mouse(_chat: "Chat", front: Front, value: Any) -> None:
    front.mouse(value is not False)


async def _set_show_thinking(chat: "Chat", front: Front, value: Any) -> None:
    chat.show_thinking = bool(value)
    front.show_thinking(chat.show_thinking)


async def _set_model(chat: "Chat", front: Front, value: Any) -> None:
    from .models import Model

    await Model().run(chat, front, value or "")


_ELSEWHERE = {
    "system": _set_system,
    "history": _set_history,
    "theme": _set_theme,
    "mouse": _set_mouse,
    "show_thinking": _set_show_thinking,
    "model": _set_model,
}


def _values(name: str) -> tuple[str, ...]:
    """What a setting may be, where that can be listed."""
    key = KEYS.get(ALIASES.get(name, name))
    match key and key.kind:
        case Choice(options):
            return (*map(str, options), DEFAULT)
        case Flag():
            return ("on", "off", DEFAULT)
    return (DEFAULT,)


class Show(Command):
    """Show the model, its parameters, system prompt, chat template, exact next prompt, or all settings.

    /show prompt [TEXT] prints what the model would read, token for token, if TEXT were sent now.
    """

    names = ("show",)
    usage = "[info|parameters|system|template|prompt [TEXT]|config]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, SUBJECTS)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        subject, _, text = argument.partition(" ")
        match choice(subject or "info", "what to show", SUBJECTS):
            case "info" | "model":
                front.report(model_report(need_model(chat)))
            case "parameters":
                front.report(parameters_report(chat))
            case "system":
                front.report(system_report(chat))
            case "template":
                front.report(Report("Chat template", (Lines(need_model(chat)["template"].split("\n")),)))
            case "prompt":
                await self._prompt(chat, front, text.strip())
            case "config":
                front.report(config_report(chat))

    async def _prompt(self, chat: "Chat", front: Front, text: str) -> None:
        need_model(chat)
        if chat.busy:
            raise UsageError(
                "/show prompt asks the model's process, which is answering: wait or stop the reply"
            )
        told = await chat.request("prompt", text=text or None, settings=chat.settings)
        front.report(Report(f"Prompt · {told['tokens']:,} tokens", (Lines(told["text"].split("\n")),)))


class Stats(Command):
    """Show what each turn cost, and the speeds; /stats json for programs."""

    names = ("stats", "status", "tokens", "usage")
    usage = "[json]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, ("json",))

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument:
            choice(argument, "the form", ("json",))
            text = json.dumps(stats_json(chat), indent=2, ensure_ascii=False)
            front.report(Report("", (Lines(text.split("\n")),)))
        elif not front.screen("stats"):
            front.report(stats_report(chat))


def stats_json(chat: "Chat") -> dict[str, Any]:
    """The figures of every turn, as plain values."""
    state = chat.state or {}
    return {
        "model": (chat.model or {}).get("name"),
        "tokens": state.get("tokens", 0),
        "context_limit": state.get("context_limit", 0),
        "turns": [{"turn": turn["number"], **turn.get("stats", {})} for turn in turns(chat)],
    }


def stats_report(chat: "Chat") -> Report:
    """One line for each turn, and the speed over turns as a picture."""
    told = stats_json(chat)
    columns = (
        "turn",
        "prompt",
        "reused",
        "first token",
        "read/s",
        "thought",
        "generated",
        "tok/s",
        "peak GiB",
    )
    speeds = [turn.get("performance", {}).get("decode_tokens_per_s", 0.0) for turn in told["turns"]]
    table = Table(columns, [_stats_row(turn) for turn in told["turns"]], ">" * len(columns))
    used = f"context {told['tokens']:,} of {told['context_limit']:,} tokens"
    title = f"{told['model'] or 'no model'} · {used}"
    if not speeds:
        return Report(title, (Lines(("nothing was said yet",)),))
    return Report(title, (table, Spark(speeds, f"tokens/s by turn, at most {max(speeds):,.1f}")))


def _stats_row(turn: dict[str, Any]) -> tuple[str, ...]:
    speed = turn.get("performance", {})
    return (
        str(turn["turn"]),
        f"{turn.get('prompt_tokens', 0):,}",
        f"{turn.get('cached_tokens', 0):,}",
        f"{speed.get('seconds_to_first_token', 0.0):.2f} s",
        f"{speed.get('prefill_tokens_per_s', 0.0):,.0f}",
        f"{turn.get('reasoning_tokens', 0):,}",
        f"{turn.get('generated_tokens', 0):,}",
        f"{speed.get('decode_tokens_per_s', 0.0):,.1f}",
        f"{speed.get('peak_nbytes', 0) / GIB:.2f}",
    )


def model_report(model: Any) -> Report:
    """What is known of the loaded model."""
    rows = [
        ("folder", str(model["path"])),
        ("size", f"{model['nbytes'] / 10**9:,.2f} GB, {model['bits_per_weight']:.2f} bits per weight"),
        ("context", f"{model['context_limit']:,} of {model['max_position_embeddings']:,} tokens"),
        ("experts", "yes" if model["moe"] else "no"),
        ("draft head", "yes" if model["mtp"] else "no"),
        ("thinks by default", "yes" if model["thinks_by_default"] else "no"),
        ("may keep thoughts", "yes" if model["can_preserve_thinking"] else "no"),
        *model.get("forms", {}).items(),
    ]
    notices = tuple(f"- {notice}" for notice in model.get("notices", ()))
    return Report(str(model["name"]), (Table(("", ""), rows), Lines(notices, "dim")))


def parameters_report(chat: "Chat") -> Report:
    rows = [
        (name, value, who, KEYS[name].kind.wanted) for name, value, who in in_force(chat.model, chat.settings)
    ]
    return Report("Parameters · /set NAME VALUE", (Table(("name", "value", "from", "wanted"), rows),))


def system_report(chat: "Chat") -> Report:
    text = (chat.state or {}).get("system")
    return Report("System prompt", (Lines(text.split("\n") if text else ("there is none",)),))


def config_report(chat: "Chat") -> Report:
    """Every setting that the program was started with, and what gave it; then those changed since."""
    options = chat.options
    rows = [(name, shown(options[name]), options.origin(name)) for name in options]
    changed = [(name, value, "/set") for name, value, who in in_force(None, chat.settings) if who]
    known = [row for row in rows if row[0] not in {name for name, _, _ in changed}]
    return Report("Settings", (Table(("name", "value", "from"), [*changed, *known]),))
