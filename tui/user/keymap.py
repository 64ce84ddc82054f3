"""The table of actions and their keys, from which the app, the key sheet and the README are made.

Users remap actions by id under `[keys]`. Refuses an unknown id, a key that no terminal can send, and two
actions on one key.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core.errors import UsageError

Scope = Literal["chat", "prompt", "transcript"]


@dataclass(frozen=True)
class Action:
    """Something that a key does; `label` is its word in the key bar, `scope` where the key works."""

    id: str
    keys: tuple[str, ...]
    label: str
    help: str
    scope: Scope = "chat"


ACTIONS: tuple[Action, ...] = (
    Action("send", ("enter",), "send", "send the message", "prompt"),
    Action("newline", ("ctrl+j", "shift+enter", "alt+enter"), "newline", "begin a new line", "prompt"),
    Action("stop", ("escape",), "stop", "stop the reply, close what is open; twice when idle: rewind"),
    Action("interrupt", ("ctrl+c",), "interrupt", "copy a selection, stop, clear the prompt; twice: quit"),
    Action("leave", ("ctrl+d",), "leave", "quit when the prompt is empty"),
    Action("complete", ("tab",), "complete", "complete a command or @file; while busy: queue", "prompt"),
    Action("history.previous", ("up",), "earlier", "earlier prompt, or a queued message, to edit", "prompt"),
    Action("history.next", ("down",), "later", "later prompt", "prompt"),
    Action("history.search", ("ctrl+r",), "search", "search earlier prompts", "prompt"),
    Action("editor", ("ctrl+g",), "editor", "write the prompt in $EDITOR", "prompt"),
    Action("keys", ("question_mark",), "keys", "the keys, when the prompt is empty", "prompt"),
    Action("transcript", ("shift+tab",), "transcript", "move about in the conversation"),
    Action("thoughts", ("ctrl+o",), "thoughts", "show or fold the thoughts"),
    Action("thinking", ("ctrl+t",), "think", "think: on, off, or with a budget"),
    Action("wrap_up", ("ctrl+y", "f4"), "wrap up", "end the thought and have the answer"),
    Action("palette", ("ctrl+p",), "commands", "all commands"),
    Action("help", ("f1",), "help", "keys and commands"),
    Action("models", ("f2",), "models", "choose a model"),
    Action("sessions", ("ctrl+s", "f3"), "sessions", "earlier conversations"),
    Action("panes", ("f5",), "panes", "show or hide the panes"),
    Action("live_bench", ("f6",), "live", "show the figures of each reply, or no longer"),
    Action("new", ("ctrl+n",), "new", "begin a new conversation"),
    Action("find", ("ctrl+f",), "find", "find in the conversation"),
    Action("scroll_up", ("pageup",), "up", "scroll up"),
    Action("scroll_down", ("pagedown",), "down", "scroll down"),
    Action("top", ("ctrl+home",), "top", "go to the beginning"),
    Action("follow", ("ctrl+end",), "follow", "go to the end and follow (end, at the end of the prompt)"),
    Action("redraw", ("ctrl+l",), "redraw", "draw the screen anew"),
    Action("suspend", ("ctrl+z",), "suspend", "back to the shell for a while; `fg` returns"),
    Action("quit", ("ctrl+q",), "quit", "quit"),
    Action("transcript.previous", ("up", "k"), "previous", "the block before", "transcript"),
    Action("transcript.next", ("down", "j"), "next", "the block after", "transcript"),
    Action("transcript.copy", ("c",), "copy", "copy the block", "transcript"),
    Action("transcript.copy_code", ("y",), "copy code", "copy its code", "transcript"),
    Action("transcript.tables", ("t",), "tables", "its tables at their full width", "transcript"),
    Action("transcript.edit", ("e",), "edit", "ask the question differently", "transcript"),
    Action("transcript.retry", ("r",), "retry", "answer it again", "transcript"),
    Action("transcript.fork", ("f",), "fork", "a new branch from here", "transcript"),
    Action("transcript.sibling_previous", ("left",), "other answer", "the answer before", "transcript"),
    Action("transcript.sibling_next", ("right",), "other answer", "the answer after", "transcript"),
    Action("transcript.fold", ("space",), "fold", "fold or open", "transcript"),
    Action("transcript.menu", ("enter",), "menu", "what can be done with the block", "transcript"),
    Action("transcript.find", ("slash",), "find", "find", "transcript"),
)
_BY_ID = {action.id: action for action in ACTIONS}

_MODIFIERS = ("ctrl", "alt", "shift", "super", "meta", "hyper")
_NAMED = {
    *("enter", "escape", "tab", "space", "backspace", "delete", "insert", "home", "end"),
    *("pageup", "pagedown", "up", "down", "left", "right"),
    *(f"f{n}" for n in range(1, 25)),
}
# keys for which a terminal sends the same byte
_SAME_BYTE = {"ctrl+i": "tab", "ctrl+m": "enter", "ctrl+h": "backspace", "ctrl+[": "escape"}
# the toolkit's names of characters, where they differ from the Unicode names
_NICKNAMES = {
    "solidus": "slash",
    "reverse_solidus": "backslash",
    "commercial_at": "at",
    "hyphen_minus": "minus",
    "plus_sign": "plus",
    "low_line": "underscore",
}
_SHORT = {"escape": "esc", "question_mark": "?", "slash": "/", "pageup": "pgup", "pagedown": "pgdn"}
_ARROWS = {"up": "↑", "down": "↓", "left": "←", "right": "→"}


class Keymap:
    """Keys by action: the user's, otherwise the defaults."""

    def __init__(self, remapped: Mapping[str, tuple[str, ...]] | None = None):
        self._remapped = dict(remapped or {})
        self._of_scope: dict[Scope, dict[str, str]] = {"chat": {}, "prompt": {}, "transcript": {}}
        for action in ACTIONS:
            self._of_scope[action.scope] |= dict.fromkeys(self.keys(action.id), action.id)

    @classmethod
    def load(cls, remap: Mapping[str, Any], source: str) -> "Keymap":
        """Return the keymap with `remap` (action id to a key or keys, nested or with dots) from `source`.

        Raises UsageError naming `source` and the key.
        """
        remapped = {name: _keys(name, value, source) for name, value in _flat(remap)}
        keymap = cls(remapped)
        keymap._refuse_clashes(source)
        return keymap

    def keys(self, action_id: str) -> tuple[str, ...]:
        return self._remapped.get(action_id, _BY_ID[action_id].keys)

    def action(self, scope: Scope, key: str) -> str | None:
        """Return the id of the action of `key` in `scope`."""
        return self._of_scope[scope].get(key)

    def shown(self, action_id: str) -> str:
        """Return the action's first key as people write it."""
        return show(self.keys(action_id)[0])

    def rows(self, scope: Scope | None = None) -> list[tuple[str, str]]:
        """Return (keys, what they do) of one scope, or of all, for the key sheet."""
        return [
            (" ".join(map(show, self.keys(action.id))), action.help)
            for action in ACTIONS
            if scope in (None, action.scope)
        ]

    def ids(self) -> list[tuple[str, str]]:
        """Return (action id, keys) in the form of [keys] in the settings."""
        return [(action.id, " ".join(map(show, self.keys(action.id)))) for action in ACTIONS]

    def textual(self) -> dict[str, str]:
        """Return the remapped keys in the form that App.set_keymap takes."""
        return {name: ",".join(keys) for name, keys in self._remapped.items()}

    def _refuse_clashes(self, source: str) -> None:
        taken: dict[tuple[str, str], str] = {}
        for action in sorted(ACTIONS, key=lambda action: action.id in self._remapped):
            for key in self.keys(action.id):
                for scope in _heard_with(action.scope):
                    other = taken.get((scope, key))
                    if other is not None and action.id in self._remapped:
                        raise UsageError(
                            f"{source}: keys.{action.id} = '{key}' is keys.{other}'s; move that one too"
                        )
                taken[action.scope, key] = action.id


def show(key: str) -> str:
    """Return `key` as people write it: esc, ?, ↑, ctrl+o."""
    *modifiers, last = key.split("+")
    return "+".join([*modifiers, _ARROWS.get(last) or _SHORT.get(last, last)])


def _heard_with(scope: Scope) -> Sequence[Scope]:
    """Return the scopes in which keys of `scope` may clash: the chat's keys work everywhere."""
    return ("chat", "prompt", "transcript") if scope == "chat" else ("chat", scope)


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in table.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return rows


def _keys(name: str, value: Any, source: str) -> tuple[str, ...]:
    if name not in _BY_ID:
        raise UsageError(f"{source}: keys.{name} is not an action; the actions are {', '.join(_BY_ID)}")
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise UsageError(f"{source}: keys.{name} must be a key or a list of keys, and is {value!r}")
    return tuple(dict.fromkeys(_key(word, f"{source}: keys.{name}") for word in words))


def _key(word: str, where: str) -> str:
    lower = word.strip().lower()
    if lower in _SAME_BYTE:
        raise UsageError(f'{where} = "{word}" cannot be used: terminals send it as {_SAME_BYTE[lower]}')
    *modifiers, last = lower.split("+") if lower not in ("", "+") and not lower.endswith("++") else [lower]
    name = _name(last)
    if not name or any(modifier not in _MODIFIERS for modifier in modifiers):
        raise UsageError(f'{where} = "{word}" is not a key; write for example "ctrl+o", "f2" or "?"')
    return "+".join([*modifiers, name])


def _name(last: str) -> str:
    """Return the toolkit's name of a key, empty if there is none; punctuation has its Unicode name."""
    if last in _NAMED or last in _SHORT or (len(last) == 1 and last.isalnum()):
        return last
    for name, short in _SHORT.items():
        if short == last:
            return name
    name = unicodedata.name(last, "") if len(last) == 1 else ""
    name = name.lower().replace("-", "_").replace(" ", "_")
    return _NICKNAMES.get(name, name)
