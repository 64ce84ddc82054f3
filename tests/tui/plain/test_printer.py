"""Links in the line-based chat can be clicked where the output is a terminal."""

import sys

import pytest

from qchat.tui.plain.printer import Printer
from tests.tui.fake_terminal import FakeTerminal

SOURCE = "See [the docs](https://example.org/a) and https://b.org/c.\n"


def printed(monkeypatch: pytest.MonkeyPatch, term: str) -> str:
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", term)
    printer = Printer()
    printer.begin_answer()
    printer.answer(SOURCE)
    printer.end_answer()
    return terminal.getvalue()


def test_addresses_are_links(monkeypatch: pytest.MonkeyPatch):
    out = printed(monkeypatch, "xterm-256color")
    assert "\x1b]8;;https://example.org/a\x1b\\" in out
    assert out.count("\x1b]8;;\x1b\\") == out.count("\x1b]8;;https") > 0


def test_a_dumb_terminal_gets_no_sequence(monkeypatch: pytest.MonkeyPatch):
    assert "\x1b" not in printed(monkeypatch, "dumb")
