"""Escape sequences by their bytes, and that no text can end one or begin another."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.tui.user import sequences
from qchat.tui.user.sequences import (
    Graphics,
    clipboard,
    find_graphics,
    kind_of_notices,
    knows_progress,
    link,
    notification,
    progress,
    takes_sequences,
    title,
)
from tests.tui.fake_terminal import FakeTerminal

HOSTILE = st.one_of(
    st.text(), st.sampled_from(["\x1b]0;x\a", "a\ab", "\x9c", "4;1;50", "a\r\nb", "\x1b\\", "‮abc"])
)


def test_the_bytes_are_those_that_terminals_know():
    assert title("Merge sort") == "\x1b]0;Merge sort\x07"
    assert [progress(share) for share in (-1, 0.5, 2)] == [f"\x1b]9;4;1;{n}\x07" for n in (0, 50, 100)]
    assert sequences.NO_PROGRESS == "\x1b]9;4;0;0\x07"
    assert sequences.FAILED_PROGRESS == "\x1b]9;4;2;0\x07"
    assert sequences.BUSY_PROGRESS == "\x1b]9;4;3;0\x07"
    assert (sequences.SAVE_TITLE, sequences.RESTORE_TITLE) == ("\x1b[22;0t", "\x1b[23;0t")
    assert notification("done; all of it", "9") == "\x1b]9;qchat: done; all of it\x07"
    assert notification("done; all of it", "777") == "\x1b]777;notify;qchat;done, all of it\x07"
    assert clipboard("abc") == "\x1b]52;c;YWJj\x07"
    assert link("here", "https://a.b") == "\x1b]8;;https://a.b\x1b\\here\x1b]8;;\x1b\\"


@given(HOSTILE)
def test_no_text_ends_a_sequence_or_begins_another(text: str):
    for made in (title(text), notification(text, "9"), notification(text, "777")):
        inside = made[2:-1]
        assert made.startswith("\x1b]") and made.endswith("\a")
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", inside)
        assert len(inside) < 1_000
    assert not notification(text, "9").startswith("\x1b]9;4;")


@pytest.mark.parametrize(
    ("env", "shown"),
    [
        ({}, False),
        ({"TERM_PROGRAM": "Apple_Terminal"}, False),
        ({"TERM_PROGRAM": "tmux"}, False),
        ({"TERM_PROGRAM": "ghostty"}, True),
        ({"TERM_PROGRAM": "WezTerm"}, True),
        ({"TERM": "xterm-kitty"}, True),
        ({"WT_SESSION": "1"}, True),
        ({"ConEmuANSI": "ON"}, True),
        ({"TERM_PROGRAM": "iTerm.app", "TERM_PROGRAM_VERSION": "3.5.14"}, False),
        ({"TERM_PROGRAM": "iTerm.app", "TERM_PROGRAM_VERSION": "3.6.6"}, True),
        ({"TERM_PROGRAM": "iTerm.app", "TERM_PROGRAM_VERSION": "nightly"}, False),
    ],
)
def test_progress_is_for_terminals_that_would_not_take_it_for_a_notification(env, shown: bool):
    assert knows_progress(env) == shown


@pytest.mark.parametrize(
    ("how", "colours", "env", "graphics"),
    [
        ("auto", "truecolor", {"TERM": "xterm-kitty"}, Graphics(True)),
        ("auto", "256", {"TERM": "xterm-ghostty"}, Graphics(False)),
        ("auto", "truecolor", {"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, Graphics(True)),
        ("auto", "truecolor", {"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, None),
        ("auto", "truecolor", {"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, None),
        ("kitty", "truecolor", {"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, Graphics(True)),
        ("auto", "truecolor", {"TERM": "xterm-kitty", "ZELLIJ": "0"}, None),
        ("auto", "truecolor", {"TERM": "xterm-kitty", "STY": "1.pts"}, None),
        ("kitty", "standard", {"TERM": "xterm-kitty"}, None),
        ("kitty", None, {"TERM": "xterm-kitty"}, None),
        ("blocks", "truecolor", {"TERM": "xterm-kitty"}, None),
        ("off", "truecolor", {"TERM": "xterm-kitty"}, None),
    ],
)
def test_pictures_are_for_terminals_that_draw_them_in_cells(how, colours, env, graphics):
    assert find_graphics(how, colours, env) == graphics


@pytest.mark.parametrize(
    ("told", "graphics"),
    [
        ("on xterm-kitty 256,RGB,title", Graphics(True, in_tmux=True)),
        ("all xterm-ghostty 256,title", Graphics(False, in_tmux=True)),
        ("on xterm-kitty", Graphics(False, in_tmux=True)),
        ("1 xterm-kitty RGB", Graphics(True, in_tmux=True)),
        ("0 xterm-kitty RGB", None),
        ("off xterm-kitty 256,RGB", None),
        ("on xterm-256color 256,RGB", None),
        ("xterm-kitty 256,RGB", None),  # a tmux that knows no allow-passthrough
        ("", None),
    ],
)
def test_tmux_tells_whether_pictures_reach_the_terminal(tmp_path: Path, told: str, graphics: Graphics | None):
    program = tmp_path / "tmux"
    program.write_text(f'#!/bin/sh\ntest "$4" = %3 && echo "{told}"\n')
    program.chmod(0o755)
    env = {"TMUX": "/tmp/socket,1,0", "TMUX_PANE": "%3", "TERM": "tmux-256color", "PATH": f"{tmp_path}:/bin"}
    assert find_graphics("auto", "truecolor", env) == graphics
    assert find_graphics("kitty", "truecolor", env) == graphics
    program.write_text("#!/bin/sh\nexit 1\n")
    assert find_graphics("auto", "truecolor", env) is None
    program.unlink()
    assert find_graphics("auto", "truecolor", env | {"PATH": str(tmp_path)}) is None


def test_notifications_have_the_number_that_the_terminal_knows():
    assert [kind_of_notices(env) for env in ({}, {"TERM": "foot"}, {"VTE_VERSION": "7600"})] == [
        "9",
        "777",
        "777",
    ]


def test_sequences_are_for_terminals_that_are_not_dumb(tmp_path):
    assert takes_sequences(FakeTerminal(), {"TERM": "xterm"})
    assert not takes_sequences(FakeTerminal(), {"TERM": "dumb"})
    assert not takes_sequences(FakeTerminal(), {})
    with (tmp_path / "file").open("w") as file:
        assert not takes_sequences(file, {"TERM": "xterm"})
