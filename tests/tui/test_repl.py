"""The line-based chat with a scripted session, and once for real in a pseudo-terminal."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from qchat.core.errors import UsageError
from qchat.core.events import Done, Event, Text
from qchat.tui.oneshot import Request
from qchat.tui.repl import Chat
from tests.checkpoints import write_checkpoint
from tests.compare import ROOT


class ScriptedSession:
    """Echoes what it is asked, and remembers what was called."""

    engine = SimpleNamespace(name="scripted")

    def __init__(self):
        self.calls: list[tuple[Any, ...]] = []

    def _reply(self, text: str) -> Generator[Event]:
        yield Text(f"you said {text}")
        yield Done("stop", text=text)

    def stream(self, text: str) -> Generator[Event]:
        self.calls.append(("stream", text))
        return self._reply(text)

    def retry(self) -> Generator[Event]:
        self.calls.append(("retry",))
        return self._reply("it again")

    def edit(self, turn: int, text: str) -> Generator[Event]:
        self.calls.append(("edit", turn, text))
        return self._reply(text)

    def undo(self) -> str:
        raise UsageError("there is no question yet")

    def reset(self) -> None:
        self.calls.append(("reset",))

    def cancel(self) -> None:
        self.calls.append(("cancel",))

    def explain(self) -> dict[str, Any]:
        turn = {"turn": 1, "cached_tokens": 3, "prefilled_tokens": 4, "how": "extend", "why": "because"}
        return {
            "turns": [turn],
            "snapshots": [0],
            "snapshot_nbytes": 1 << 20,
            "snapshot_budget_nbytes": 1 << 21,
        }


@pytest.fixture
def chat() -> Chat:
    return Chat(ScriptedSession(), Request("m", ""))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("hello", ("stream", "hello")),
        ("/retry", ("retry",)),
        ("/edit 2 and now?", ("edit", 2, "and now?")),
        ("/new", ("reset",)),
    ],
)
def test_a_line_is_said_or_done(chat, line, call):
    chat.answer(line)
    assert chat.session.calls == [call]


def test_the_reply_is_printed_once(chat, capsys):
    chat.answer("hello")
    assert capsys.readouterr().out == "you said hello\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/undo", "there is no question yet"),
        ("/edit x", "/edit N TEXT"),
        ("/frobnicate", "there is no command /frobnicate: /help,"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(chat, capsys, line, sentence):
    chat.answer(line)
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_help_lists_every_command_and_cache_explains(chat, capsys):
    chat.answer("/help")
    chat.answer("/cache")
    said = capsys.readouterr().out
    assert all(f"{name}" in said for name in (*chat.commands, "/bye"))
    assert "turn 1: 3 kept, 4 read (extend: because)" in said
    assert "1 kept states, 1 of 2 MiB" in said


def test_in_a_terminal_it_answers_and_leaves_with_ctrl_d(tmp_path):
    write_checkpoint(tmp_path)
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev"), "QCHAT_COMPILE": "off"}
    command = [sys.executable, "-m", "qchat.tui", str(tmp_path), "--max-tokens", "4", "--no-think"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        screen = read_until(ours, "❯")
        os.write(ours, b"hello\r")
        screen += read_until(ours, "token limit", "❯")
        os.write(ours, b"\x04")
        assert process.wait(20) == 0
    os.close(ours)
    assert "ctrl-D leaves" in screen


def read_until(terminal: int, *marks: str, seconds: float = 30) -> str:
    """What appears on the terminal until one of `marks` does."""
    seen, end = "", time.monotonic() + seconds
    while not any(mark in seen for mark in marks):
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, f"none of {marks} appeared in {seen!r}"
        seen += os.read(terminal, 65536).decode(errors="replace")
        if "\x1b[6n" in seen:  # the terminal is asked where its cursor is
            os.write(terminal, b"\x1b[1;1R")
            seen = seen.replace("\x1b[6n", "")
    return seen
