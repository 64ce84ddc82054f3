"""Keys by action: remapping, refusals that name file and key, and one table for all."""

import pytest

from qchat.core.errors import UsageError
from qchat.tui.user.keymap import ACTIONS, Keymap, show

FILE = "/home/u/.config/qchat/config.toml"


def refused(remap: dict) -> str:
    with pytest.raises(UsageError) as caught:
        Keymap.load(remap, FILE)
    return str(caught.value)


def test_the_usual_keys_do_not_clash():
    usual = {action.id: action.keys for action in ACTIONS}
    keymap = Keymap.load({name: list(keys) for name, keys in usual.items()}, FILE)
    assert {name: keymap.keys(name) for name in usual} == usual


def test_a_remapped_action_has_its_new_keys_and_no_other():
    keymap = Keymap.load({"thoughts": ["f8", "ctrl+b"]}, FILE)
    assert keymap.keys("thoughts") == ("f8", "ctrl+b")
    assert keymap.action("chat", "f8") == "thoughts"
    assert keymap.action("chat", "ctrl+o") is None
    assert keymap.textual() == {"thoughts": "f8,ctrl+b"}
    assert keymap.shown("thoughts") == "f8"


def test_ids_with_a_dot_may_come_as_nested_tables():
    keymap = Keymap.load({"transcript": {"copy": "x"}}, FILE)
    assert keymap.action("transcript", "x") == "transcript.copy"


def test_a_freed_key_can_be_given_to_another_action():
    keymap = Keymap.load({"thoughts": "ctrl+t", "thinking": "ctrl+o"}, FILE)
    assert keymap.action("chat", "ctrl+t") == "thoughts"


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("!", "exclamation_mark"),
        ("Ctrl+B", "ctrl+b"),
        ("F8", "f8"),
        ("+", "plus"),
        ("ctrl+_", "ctrl+underscore"),
    ],
)
def test_keys_are_written_as_people_write_them(word: str, key: str):
    assert Keymap.load({"transcript.fold": word}, FILE).keys("transcript.fold") == (key,)


@pytest.mark.parametrize("keys", ["ctrl+", "hyperspace", "ctrl+ab", "", "boing+x", "\n"])
def test_what_is_no_key_is_refused_with_file_and_key(keys: str):
    said = refused({"thoughts": keys})
    assert said.startswith(f"{FILE}: keys.thoughts = ")
    assert "is not a key" in said


@pytest.mark.parametrize(("key", "other"), [("ctrl+i", "tab"), ("ctrl+m", "enter"), ("ctrl+[", "escape")])
def test_keys_that_terminals_cannot_tell_apart_are_refused(key: str, other: str):
    assert f"terminals send it as {other}" in refused({"thoughts": key})


def test_an_unknown_action_is_refused_with_the_known_ones():
    said = refused({"thougts": "f8"})
    assert f"{FILE}: keys.thougts is not an action" in said
    assert "thoughts" in said


@pytest.mark.parametrize("keys", [[], 3, [3], None])
def test_what_is_not_a_key_or_a_list_is_refused(keys):
    assert "must be a key or a list of keys" in refused({"thoughts": keys})


@pytest.mark.parametrize(
    ("action", "key", "other"),
    [
        ("thoughts", "ctrl+t", "thinking"),
        ("history.search", "ctrl+o", "thoughts"),
        ("transcript.copy", "e", "transcript.edit"),
        ("thoughts", "tab", "complete"),
        ("send", "escape", "stop"),
    ],
)
def test_two_actions_on_one_key_are_refused_naming_both(action: str, key: str, other: str):
    said = refused({action: key})
    assert f"{FILE}: keys.{action} = '{key}' is keys.{other}'s" in said


def test_the_prompt_and_the_conversation_may_share_a_key():
    assert Keymap.load({"transcript.copy": "ctrl+g"}, FILE).action("prompt", "ctrl+g") == "editor"


def test_the_key_sheet_has_every_action_once_and_the_live_keys():
    rows = Keymap.load({"thoughts": "f8"}, FILE).rows()
    assert len(rows) == len(ACTIONS)
    assert ("f8", "show or fold the thoughts") in rows
    assert ("thoughts", "f8") in Keymap.load({"thoughts": "f8"}, FILE).ids()


def test_keys_are_shown_briefly():
    assert [show(key) for key in ("escape", "question_mark", "ctrl+up", "pageup")] == [
        "esc",
        "?",
        "ctrl+↑",
        "pgup",
    ]
