"""Copying: which way is taken, and that what is said about it is true."""

import base64
import os
from pathlib import Path

import pytest

from qchat.tui.user import clipboard
from qchat.tui.user.clipboard import copy

VARIABLES = ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION", "SSH_TTY")


@pytest.fixture(autouse=True)
def desktop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux desktop without any clipboard program; returns the folder where such are looked for."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(clipboard.sys, "platform", "linux")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    monkeypatch.setattr(clipboard.shutil, "which", lambda name: (tmp_path / name).exists() or None)
    return tmp_path


def program(folder: Path, name: str, code: int = 0) -> Path:
    """A clipboard program that keeps what it is given, or fails."""
    kept = folder / f"{name}.kept"
    (folder / name).write_text(f'#!/bin/sh\ncat > "{kept}"\nexit {code}\n')
    (folder / name).chmod(0o755)
    return kept


@pytest.mark.parametrize(
    ("name", "variable"), [("wl-copy", "WAYLAND_DISPLAY"), ("xclip", "DISPLAY"), ("xsel", "DISPLAY")]
)
def test_the_desktops_program_gets_the_text(desktop: Path, monkeypatch, name: str, variable: str):
    monkeypatch.setenv(variable, "x")
    kept = program(desktop, name)
    assert copy("café\n中") == "copied 2 lines"
    assert kept.read_text() == "café\n中"


def test_on_a_mac_it_is_pbcopy(desktop: Path, monkeypatch):
    monkeypatch.setattr(clipboard.sys, "platform", "darwin")
    kept = program(desktop, "pbcopy")
    assert copy("abc") == "copied 3 characters"
    assert kept.read_text() == "abc"


def test_a_program_that_fails_has_not_copied(desktop: Path, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    program(desktop, "xclip", code=1)
    assert copy("abc", lambda _: None) == "not copied: xclip refused the text"


def test_without_a_program_the_terminal_is_asked_and_nothing_is_promised():
    written: list[str] = []
    said = copy("abc", written.append)
    assert written == [f"\x1b]52;c;{base64.b64encode(b'abc').decode()}\a"]
    assert "may ignore" in said


def test_over_ssh_the_terminal_is_asked_even_where_there_is_a_program(desktop: Path, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("SSH_TTY", "/dev/pts/0")
    kept = program(desktop, "xclip")
    written: list[str] = []
    copy("abc", written.append)
    assert written
    assert not kept.exists()


def test_what_terminals_would_cut_is_not_sent():
    written: list[str] = []
    assert "not copied" in copy("x" * 60_000, written.append)
    assert written == []


def test_without_any_way_that_is_said():
    assert "no clipboard program" in copy("abc")
