"""Settings as commands change and show them: other names, values as text, the effects of a change.

Every command that changes a setting does it by `change` or `Settings.change`, so that `/show config` knows.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from ..tasks.words import words
from ..text.output import printable
from ..user.settings import KEYS, Key, Settings, key_of
from .base import Front, first_words

if TYPE_CHECKING:
    from ..chat.controller import Chat

ALIASES = {
    alias: key.name for key in KEYS.values() for alias in (*key.aliases, key.reply) if alias is not None
}
OF_REPLIES = tuple(key.name for key in KEYS.values() if key.reply)
MODEL = "the model"  # the origin of what its authors recommend


def key_called(name: str, where: str) -> Key:
    """Return a key by any of its names. Raises UsageError that begins with `where`."""
    plain = name.lower().replace("-", "_")
    return key_of(ALIASES.get(plain, plain), where)


def reply_key(name: str, where: str) -> Key:
    """Return the key of a setting of replies by any of its names. Raises UsageError."""
    key = key_called(name, where)
    if key.reply is None:
        raise UsageError(f"{where}: {key.name} is not a setting of replies, wanted {', '.join(OF_REPLIES)}")
    return key


def parse_pairs(argument: str, where: str) -> dict[str, Any]:
    """Parse `temperature=0.9 top_k=40` into the parameters of a reply. Raises UsageError."""
    given: dict[str, Any] = {}
    for word in words(argument):
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"{where}: {word!r:.40} has no =, wanted SETTING=VALUE")
        key = reply_key(name, where)
        given[str(key.reply)] = key.parameter(key.parse(text, where))
    return given


def format_value(value: Any) -> str:
    """Return a setting's value as one would type it."""
    match value:
        case None:
            return "default"
        case bool():
            return "on" if value else "off"
        case float():
            return f"{value:g}"
        case list() | tuple():
            return " ".join(map(repr, value)) or "none"
    return str(value)


def schema_name(settings: Settings) -> str:
    """Return the name of the file whose schema answers satisfy, as a row shows it; empty without one."""
    schema = settings["schema"]
    return "" if schema is None else printable(first_words(Path(schema.path).name, 40))


def in_force(chat: "Chat") -> Settings:
    """Return the chat's settings, with what the loaded model's authors recommend in place of defaults."""
    return chat.settings.with_model(chat.model.parameters if chat.model else {}, MODEL)


async def change(chat: "Chat", front: Front, name: str, value: Any, origin: str) -> str:
    """Change a setting, None to its default, and make the change take effect; return a sentence that says so.

    A change that fails leaves the setting as it was. Raises QchatError.
    """
    key = KEYS[name]
    await take_effect(chat, front, name, key.default if value is None else key.check(value, origin))
    chat.settings.change(name, value, origin)
    if name == "schema":
        front.status(chat.status)  # the row that names it
    if name == "system":
        return "the system prompt holds from the next question; the conversation is read again under it"
    when = {"now": "now", "next load": "from the next /load"}.get(key.applies, f"from the {key.applies}")
    return f"{key.name} is {format_value(chat.settings[name])} {when}"


async def take_effect(chat: "Chat", front: Front, name: str, value: Any) -> None:
    """Have a setting's value reach what is there already; the caller changes it then. Raises QchatError."""
    effect = _EFFECTS.get(name)
    if effect is not None:
        await effect(chat, front, value)


async def _apply_system(chat: "Chat", _front: Front, text: str | None) -> None:
    await chat.set_system(text)


async def _apply_history(chat: "Chat", _front: Front, mode: str | None) -> None:
    by_default = "preserve" if chat.model and chat.model.can_preserve_thinking else "strip"
    await chat.set_history(mode or by_default)


async def _apply_theme(_chat: "Chat", front: Front, name: str) -> None:
    front.set_theme(name)


async def _apply_mouse(_chat: "Chat", front: Front, on: bool) -> None:
    front.mouse(on)


async def _apply_show_thinking(_chat: "Chat", front: Front, shown: bool) -> None:
    front.show_thinking(shown)


async def _apply_pictures(_chat: "Chat", front: Front, how: str) -> None:
    front.show_pictures(how)


async def _apply_panes(chat: "Chat", front: Front, shown: bool) -> None:
    front.show_panes(chat.settings["shown_panes"] if shown else ())


async def _apply_shown_panes(chat: "Chat", front: Front, names: Sequence[str]) -> None:
    front.show_panes(names if chat.settings["panes"] else ())


# settings whose change reaches something that is already there; all others are read when they are needed
_EFFECTS: Mapping[str, Callable[["Chat", Front, Any], Awaitable[None]]] = {
    "system": _apply_system,
    "history": _apply_history,
    "theme": _apply_theme,
    "mouse": _apply_mouse,
    "show_thinking": _apply_show_thinking,
    "pictures": _apply_pictures,
    "panes": _apply_panes,
    "shown_panes": _apply_shown_panes,
}
