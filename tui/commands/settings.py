"""Commands that change and show settings, and show facts about the model."""

# ruff: noqa: ARG002  a command need not use all that commands are given

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from ...core.worker.wire import ModelInfo, PromptResult
from ..text.report import Lines, Report, Table
from ..user.attachments import complete as complete_path
from ..user.attachments import read
from ..user.kinds import OFF, list_words
from ..user.paths import config_file
from ..user.settings import KEYS, Key, Settings, save, unsave
from .base import Command, Front, choice, first_words, need_model, starting
from .parameters import ALIASES, MODEL, OF_REPLIES, change, format_value, in_force, key_called
from .thinking import describe_thinking, set_thinking

if TYPE_CHECKING:
    from ..chat.controller import Chat

DEFAULT = "default"
SAVE = " --save"
SWITCHES = ("think", "nothink", "verbose", "quiet")
AT_START = tuple(key.name for key in KEYS.values() if key.applies == "next start")
OF_THE_ENGINE = ("model", "system", "history")  # settings that change what was read or loaded
# what the front end shows, or says that it cannot
SHOWN_BY_FRONT = ("theme", "mouse")
SUBJECTS = ("info", "model", "parameters", "system", "template", "prompt", "config")


class System(Command):
    """Set the system prompt, from a file with @FILE; "" removes it; without TEXT show it."""

    names = ("system",)
    usage = '[TEXT|@FILE|""]'

    def runs_at_once(self, argument: str) -> bool:
        return not argument

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        if not argument.startswith("@"):
            return []
        return [f"@{path}" for path in complete_path(argument[1:], Path.cwd())]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument:
            front.report(system_report(chat))
            return
        front.note(await change(chat, front, "system", read_system(argument), "/system"))


def read_system(argument: str) -> str | None:
    """Return the system prompt that TEXT, @FILE or an empty pair of quotes stands for."""
    text = read(argument[1:], Path.cwd()).text if argument.startswith("@") else argument
    text = text.strip().removeprefix('"""').removesuffix('"""').strip()
    return None if text in ("", '""') else text


class Schema(Command):
    """Have answers satisfy the JSON schema in FILE; off lets them be anything again; without FILE show it.

    A thought stays free: only the answer after it is JSON of the schema. Needs the extra `structured`.
    """

    names = ("schema",)
    usage = "[FILE|off]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return [*starting(argument, (OFF,)), *complete_path(argument, Path.cwd())]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument:
            front.report(schema_report(chat))
            return
        # in a thread: a large schema takes a while to check
        schema = await asyncio.to_thread(KEYS["schema"].parse, argument, "/schema")
        await change(chat, front, "schema", schema, "/schema")
        said = f"satisfy the schema in {schema}" if schema else "may be anything"
        front.note(f"answers {said} from the next reply")


class Set(Command):
    """Change a setting for this run: /set temperature 0.7, /set think off; default restores the default.

    With --save it also becomes your default: the settings file is changed, and nothing else in it.
    Ollama's words are understood too: /set parameter NAME VALUE, /set think, /set nothink, /set system TEXT,
    /set verbose, /set quiet.
    """

    names = ("set",)
    confirms = True
    usage = "NAME VALUE [--save]"
    while_busy = True

    def runs_at_once(self, argument: str) -> bool:
        name = argument.removeprefix("parameter ").partition(" ")[0]
        return ALIASES.get(name, name) not in OF_THE_ENGINE

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
        given = argument.removesuffix(SAVE)
        name, _, value = given.partition(" ")
        if name == "parameter":
            name, _, value = value.strip().partition(" ")
            if not name:
                raise self.wrong("say which parameter")
        elif argument in SWITCHES:
            self._switch(chat, front, name)
            return
        await self._set(chat, front, name, value.strip(), keep=given != argument)

    def _switch(self, chat: "Chat", front: Front, name: str) -> None:
        if name in ("think", "nothink"):
            set_thinking(chat, name == "think", "/set")
            front.note(describe_thinking(chat))
            return
        chat.show_stats = name == "verbose"
        front.note("each reply ends with its figures" if chat.show_stats else "replies end without figures")

    async def _set(self, chat: "Chat", front: Front, name: str, text: str, *, keep: bool) -> None:
        key = key_called(name, "/set")
        if not text:
            raise UsageError(f"/set {key.name}: the value is missing, wanted {key.kind.wanted}")
        if key.name in AT_START and not keep:
            raise UsageError(
                f"/set {key.name}: it takes effect only when qchat starts; /set {key.name} {text:.60}{SAVE} "
                f"saves it in {config_file()}"
            )
        if key.name == "model":
            from .models import Model

            await Model().run(chat, front, "" if text == DEFAULT else text)
            value = chat.settings["model"]
        else:
            value = None if text == DEFAULT else _parse(key, text)
            await self._apply(chat, front, key, value)
        if keep:
            front.note(_save(key, value, remove=text == DEFAULT or (value is None and key.name == "system")))

    async def _apply(self, chat: "Chat", front: Front, key: Key, value: Any) -> None:
        if key.name in AT_START:
            return
        changed = await change(chat, front, key.name, value, "/set")
        if key.name not in SHOWN_BY_FRONT:
            front.note(changed)


def _save(key: Key, value: Any, *, remove: bool) -> str:
    """Save a setting in the user's file, or remove it there; return a sentence that says so."""
    if remove:
        unsave(key.name)
        return f"{config_file()} no longer sets {key.name}"
    return f"{key.name} is saved in {save(key.name, value)}"


def _parse(key: Key, text: str) -> Any:
    return read_system(text) if key.name == "system" else key.parse(text, "/set")


def _values(name: str) -> tuple[str, ...]:
    """Return the values that a setting may have, if they can be listed."""
    key = KEYS.get(ALIASES.get(name, name))
    return (*(list_words(key.kind) if key else ()), DEFAULT)


class Show(Command):
    """Show the model, its parameters, system prompt, chat template, exact next prompt, or all settings.

    /show prompt [TEXT] prints what the model would read, token for token, if TEXT were sent now.
    """

    names = ("show",)
    usage = "[info|parameters|system|template|prompt [TEXT]|config]"
    while_busy = True

    def runs_at_once(self, argument: str) -> bool:
        return argument.partition(" ")[0] != "prompt"  # which the engine renders

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, SUBJECTS)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        subject, _, text = argument.partition(" ")
        match choice(subject or "info", "what to show", SUBJECTS):
            case "info" | "model":
                report = model_report(need_model(chat))
            case "parameters":
                report = parameters_report(chat)
            case "system":
                report = system_report(chat)
            case "template":
                report = Report("Chat template", (Lines(need_model(chat).template.split("\n")),))
            case "prompt":
                report = await self._prompt(chat, text.strip())
            case _:
                report = config_report(chat)
        front.report(report)
        chat.kept_results.keep(report, chat.state.conversation, len(chat.state.turns))

    async def _prompt(self, chat: "Chat", text: str) -> Report:
        need_model(chat)
        prompt: PromptResult = await chat.request("prompt", text=text or None, settings=chat.settings.reply())
        return Report(f"Prompt · {prompt.tokens:,} tokens", (Lines(prompt.text.split("\n")),))


def model_report(model: ModelInfo) -> Report:
    """Return the facts about a loaded model."""
    rows = [
        ("folder", model.path),
        ("size", f"{model.nbytes / 10**9:,.2f} GB, {model.bits_per_weight:.2f} bits per weight"),
        ("context", context_words(model)),
        ("kind", "mixture of experts" if model.moe else "dense"),
        ("draft head", "yes" if model.mtp else "no"),
        ("thinks by default", "yes" if model.thinks_by_default else "no"),
        ("can keep earlier thoughts", "yes" if model.can_preserve_thinking else "no"),
        *model.forms.items(),
    ]
    notices = tuple(f"- {notice}" for notice in model.notices)
    return Report(model.name, (Table(("", ""), rows), Lines(notices, "dim")))


def context_words(model: ModelInfo) -> str:
    """Return the context in use, and what the model knows where that is more."""
    longest = model.max_position_embeddings
    more = f" of {longest:,}" if longest != model.context_limit else ""
    return f"{model.context_limit:,}{more} tokens"


def parameters_report(chat: "Chat") -> Report:
    """Return every setting of replies, and whether the user or the model gave it."""
    settings = in_force(chat)
    rows = [
        (name, format_value(settings[name]), _giver(settings, name), KEYS[name].kind.wanted)
        for name in OF_REPLIES
    ]
    return Report("Parameters · /set NAME VALUE", (Table(("name", "value", "from", "wanted"), rows),))


def _giver(settings: Settings, name: str) -> str:
    if settings.given(name):
        return "you"
    return MODEL if settings.origin(name) == MODEL else ""


def system_report(chat: "Chat") -> Report:
    text = chat.state.system
    return Report("System prompt", (Lines(text.split("\n") if text else ("there is none",)),))


def schema_report(chat: "Chat") -> Report:
    schema = chat.settings["schema"]
    if schema is None:
        return Report("Schema", (Lines(("there is none",)),))
    text = json.dumps(schema.schema, indent=2, ensure_ascii=False)
    return Report(f"Schema · {schema}", (Lines(text.split("\n")),))


def config_report(chat: "Chat") -> Report:
    """Return every setting with its value in force and where that came from."""
    settings = in_force(chat)
    rows = [
        (name, first_words(format_value(settings[name]), 200), settings.origin(name)) for name in settings
    ]
    return Report("Settings", (Table(("name", "value", "from"), rows),))
