"""The line that replaces itself: on a terminal alone, erased cell by cell, a few times a second."""

import sys
from types import SimpleNamespace

import pytest

from qchat.tui.cli.run_task import JobView
from qchat.tui.text import statusline
from qchat.tui.text.statusline import StatusLine

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def at_a_terminal(monkeypatch: Patch, seconds: float = 1.0) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(statusline, "time", SimpleNamespace(monotonic=lambda: seconds))


def test_a_line_is_erased_by_its_cells(monkeypatch: Patch, capsys: Capture):
    at_a_terminal(monkeypatch)
    line = StatusLine()
    line.show("模型 1")
    line.clear()
    line.clear()
    assert capsys.readouterr().err == "\r\r模型 1" + "\r" + " " * 6 + "\r"


def test_what_comes_too_soon_is_dropped(monkeypatch: Patch, capsys: Capture):
    at_a_terminal(monkeypatch)
    line = StatusLine()
    line.show("one")
    line.show("two")
    at_a_terminal(monkeypatch, 1.2)
    line.show("three")
    assert capsys.readouterr().err == "\r\rone\r   \rthree"


@pytest.mark.parametrize("quiet", [False, True])
def test_nothing_is_shown_where_nobody_looks(quiet: bool, monkeypatch: Patch, capsys: Capture):
    if quiet:
        at_a_terminal(monkeypatch)
    line = StatusLine(quiet=quiet)
    line.show("one")
    line.clear()
    assert capsys.readouterr().err == ""


def test_what_a_conversion_says_takes_the_place_of_its_progress(monkeypatch: Patch, capsys: Capture):
    at_a_terminal(monkeypatch)
    view = JobView()
    view({"event": "progress", "done": 1, "total": 4, "unit": "bytes", "detail": "writing 模型"})
    view({"event": "notice", "text": "mind this"})
    shown = " 25%  0.00 of 0.00 GB · writing 模型"
    assert capsys.readouterr().err == f"\r\r{shown}\r{' ' * (len(shown) + 2)}\rqchat: mind this\n"
