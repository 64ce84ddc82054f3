"""What tests of tools in a chat begin with: a working folder with a file, and replies that call tools."""

from pathlib import Path
from typing import Any

import pytest

ANSWER = {"method": "answer_tools", "answer": "There."}


def work_in(parent: Path, monkeypatch: pytest.MonkeyPatch, notes: str) -> Path:
    """Make `work` below `parent` the working folder, with `notes` in notes.txt; return it."""
    folder = parent / "work"
    folder.mkdir()
    (folder / "notes.txt").write_text(notes)
    monkeypatch.chdir(folder)
    return folder


def calls(*called: tuple[str, dict[str, Any]], method: str = "send", **step: Any) -> dict[str, Any]:
    """A reply that calls tools."""
    named = [{"name": name, "arguments": arguments} for name, arguments in called]
    return {"method": method, "answer": "", "calls": named, **step}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """A reply that calls one tool."""
    return calls((name, arguments))
