"""What is decided before a chat begins, and what is left on the terminal after it."""

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qchat.tui import launch
from qchat.tui.chat import Chat
from qchat.tui.settings import Settings

STREAMS = ("stdin", "stdout", "stderr")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in STREAMS:
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    return monkeypatch


def test_a_full_terminal_gets_the_full_screen(terminal: pytest.MonkeyPatch):
    del terminal
    assert launch.is_full(Settings())


@pytest.mark.parametrize("name", STREAMS)
def test_no_full_screen_where_a_stream_is_no_terminal(terminal: pytest.MonkeyPatch, name: str):
    terminal.setattr(getattr(sys, name), "isatty", lambda: False)
    assert not launch.is_full(Settings())


@pytest.mark.parametrize("term", ["dumb", "", None])
def test_no_full_screen_on_a_terminal_that_can_do_nothing(terminal: pytest.MonkeyPatch, term: str | None):
    if term is None:
        terminal.delenv("TERM")
    else:
        terminal.setenv("TERM", term)
    assert not launch.is_full(Settings())


@pytest.mark.parametrize("setting", ["plain", "screen_reader"])
def test_no_full_screen_where_it_is_not_wanted(terminal: pytest.MonkeyPatch, setting: str):
    del terminal
    assert not launch.is_full(Settings().replaced("test", **{setting: True}))


def left_behind(turns: list[dict[str, Any]], conversation: int | None, capsys: pytest.CaptureFixture) -> str:
    chat = SimpleNamespace(state={"turns": turns, "conversation": conversation})
    launch._say_farewell(cast(Chat, chat))
    return capsys.readouterr().out


def test_the_last_exchange_stays_on_the_terminal(capsys: pytest.CaptureFixture):
    answer = "\n".join(f"line {n}" for n in range(20))
    said = left_behind([{"question": "a\nlong one", "answer": answer}], 7, capsys).splitlines()
    assert said[:3] == ["❯ a long one", "", "… 8 lines before"]
    assert said[3:] == [*(f"line {n}" for n in range(8, 20)), "", "qchat -c goes on with this conversation"]


def test_what_is_not_stored_is_not_said_to_go_on(capsys: pytest.CaptureFixture):
    assert "qchat -c" not in left_behind([{"question": "a", "answer": "b"}], None, capsys)


def test_a_chat_without_a_word_leaves_nothing(capsys: pytest.CaptureFixture):
    assert left_behind([], None, capsys) == ""
