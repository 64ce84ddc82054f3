"""The user's consent: to calls of tools, and to the servers that a project wants started.

What the user agreed to for good is kept in the state folder. A file that is damaged counts as no consent.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.errors import UsageError
from ...core.machine.files import read_json
from ..text.sanitise import printable
from ..user.paths import state_dir
from ..user.toml_file import write_text
from .base import Tool

FILE = "tools.json"
MAX_FILE_NBYTES = 1 << 20
Scope = Literal["once", "conversation", "always"]


@dataclass(frozen=True)
class Decision:
    """What the user said to a call; a refusal may give the model a `reason`."""

    allowed: bool
    scope: Scope = "once"
    reason: str = ""


@dataclass(frozen=True)
class Question:
    """A call that needs consent; `may_last` tells whether it can be given for more than this call."""

    tool: Tool
    arguments: Mapping[str, Any]

    @property
    def may_last(self) -> bool:
        return self.tool.asks != "always"

    @property
    def title(self) -> str:
        server = f" of the server {self.tool.owner}" if self.tool.owner else ""
        return f"The model wants to call {self.tool.name}{server}"

    def lines(self) -> list[str]:
        """Return the arguments as lines; a text that holds invisible characters is shown escaped."""
        return [line for name, value in self.arguments.items() for line in _argument(str(name), value)]


def _argument(name: str, value: Any) -> list[str]:
    is_plain = isinstance(value, str) and printable(value) == value
    text = value if is_plain else json.dumps(value, ensure_ascii=True)
    first, *rest = text.split("\n")
    return [f"{printable(name)}: {first}", *(f"    {line}" for line in rest)]


class Consent:
    """What the user agreed to: for this conversation, and for good."""

    def __init__(self) -> None:
        self._for_conversation: set[str] = set()

    def forget_conversation(self) -> None:
        """Ask again for what was allowed in a conversation that is now left."""
        self._for_conversation.clear()

    def needs_question(self, tool: Tool) -> bool:
        """Whether the user has to be asked about the next call of a tool."""
        if tool.asks == "always":
            return True
        return not (tool.asks == "never" or tool.key in self._for_conversation or tool.key in _kept("always"))

    def is_kept(self, tool: Tool) -> bool:
        """Whether the user allowed a tool for good."""
        return tool.key in _kept("always")

    def record(self, tool: Tool, decision: Decision) -> None:
        """Remember a decision for as long as it holds. Raises UsageError where it cannot be kept."""
        if decision.allowed and decision.scope == "conversation":
            self._for_conversation.add(tool.key)
        if decision.allowed and decision.scope == "always":
            _keep("always", tool.key, True)

    def revoke(self, tool: Tool) -> None:
        """Ask about a tool again. Raises UsageError where that cannot be kept."""
        self._for_conversation.discard(tool.key)
        if self.is_kept(tool):
            _keep("always", tool.key, False)


def project_key(path: Path, content: bytes) -> str:
    """Return what the answer about a project's file is kept under; another content is another question."""
    return hashlib.sha256(b"\0".join((str(path.absolute()).encode(), content))).hexdigest()


def project_answer(key: str) -> bool | None:
    """Return whether the user let a project start its servers; None if that was never asked."""
    return _kept("projects").get(key)


def keep_project_answer(key: str, *, allowed: bool) -> None:
    """Keep the user's answer about a project. Raises UsageError where it cannot be kept."""
    _keep("projects", key, allowed)


def _read() -> dict[str, Any]:
    with suppress(UsageError):
        path = state_dir() / FILE
        return read_json(path, UsageError, MAX_FILE_NBYTES) if path.exists() else {}
    return {}


def _kept(kind: Literal["always", "projects"]) -> dict[str, bool]:
    found = _read().get(kind)
    known = found if isinstance(found, dict) else {}
    return {name: value for name, value in known.items() if isinstance(value, bool)}


def _keep(kind: Literal["always", "projects"], key: str, value: bool) -> None:
    kept = _kept(kind) | {key: value}
    if kind == "always":
        kept = {name: True for name, allowed in kept.items() if allowed}
    write_text(state_dir() / FILE, json.dumps({**_read(), kind: kept}, indent=1) + "\n")
