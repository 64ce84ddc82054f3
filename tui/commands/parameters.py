"""The settings of a reply as commands write and show them; `user/settings.py` has the table of keys.

Accepts the names that sessions and ollama use, besides those of the settings.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from ..tasks.words import words
from ..user.settings import KEYS, Key, key_of

if TYPE_CHECKING:
    from ..chat.controller import Chat

ALIASES = {
    "temp": "temperature",
    "num_predict": "max_tokens",
    "num_ctx": "context_limit",
    "repeat_penalty": "repetition_penalty",
    "budget": "thinking_budget",
    **{key.reply: key.name for key in KEYS.values() if key.reply},
}
OF_REPLIES = tuple(key.name for key in KEYS.values() if key.reply)


def key_called(name: str, where: str) -> Key:
    """Find a setting by any of its names. Raises UsageError that begins with `where` and has the nearest."""
    plain = name.lower().replace("-", "_")
    return key_of(ALIASES.get(plain, plain), where)


def reply_key(name: str, where: str) -> Key:
    """Find a setting of replies by any of its names. Raises UsageError."""
    key = key_called(name, where)
    if key.reply is None:
        raise UsageError(f"{where}: {key.name} is no setting of a reply, wanted {', '.join(OF_REPLIES)}")
    return key


def parse_pairs(argument: str, where: str) -> dict[str, Any]:
    """Read `temperature=0.9 top_k=40`; names become the session's. Raises UsageError."""
    given: dict[str, Any] = {}
    for word in words(argument):
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"{where}: {word!r:.40} sets nothing, wanted SETTING=VALUE")
        key = reply_key(name, where)
        given[str(key.reply)] = key.parsed(text, where)
    return given


def set_reply(chat: "Chat", name: str, value: Any) -> None:
    """Set a reply setting from now on, by the session's name; None leaves it to the model."""
    if value is None:
        chat.settings.pop(name, None)
    else:
        chat.settings[name] = value


def shown(value: Any) -> str:
    """Format a setting's value as one would type it."""
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


def in_force(model: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List every setting of replies: its name, its value, and who chose it."""
    recommended = (model or {}).get("parameters", {})
    rows = []
    for key in KEYS.values():
        if not key.reply:
            continue
        if settings.get(key.reply) is not None:
            rows.append((key.name, shown(settings[key.reply]), "you"))
        elif recommended.get(key.reply) is not None:
            rows.append((key.name, shown(recommended[key.reply]), "the model"))
        else:
            rows.append((key.name, "default", ""))
    return rows
