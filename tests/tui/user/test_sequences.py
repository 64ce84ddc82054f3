"""Escape sequences by their bytes, and that no text can end one or begin another."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.tui.user import sequences
from qchat.tui.user.sequences import (
    clipboard,
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
