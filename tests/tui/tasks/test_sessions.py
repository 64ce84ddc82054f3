"""`qchat sessions`: what it lists, finds, shows, writes, reads, renames and deletes."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from qchat.core import BUILT_IN_MODEL, Store
from qchat.core.hub.library import Locations
from qchat.core.storage.records import ModelIdentity
from qchat.core.storage.state_files import SERVED, claim, state_path
from qchat.tui.chat.conversations import describe_other_model, model_of, open_store, when
from qchat.tui.cli.launch import Launch, _beginning
from qchat.tui.cli.main import main
from qchat.tui.tasks.sessions import row
from qchat.tui.text.columns import columns
from qchat.tui.user.settings import Settings
from tests.checkpoints import write_checkpoint
from tests.tui.conversing import talk


@pytest.fixture
def store() -> Iterator[Store]:
    """The user's conversations: 1 on planets, 2 on plants, 3 on cheese."""
    with open_store() as opened:
        talk(opened, "Which planets are there?", "Eight of them.", thinking="Let me count.")
        talk(opened, "Which plants climb?", "Ivy does.")
        talk(opened, "Name a cheese.", "Brie.", title="On cheese")
        yield opened


@pytest.fixture
def said(store: Store, capsys: pytest.CaptureFixture[str]):
    """Runs the verb: exit code, stdout, stderr."""
    assert store.conversations()

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["sessions", *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_without_conversations_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert main(["sessions"]) == 0
    assert capsys.readouterr() == ("", "qchat: there are no conversations yet\n")


def test_it_lists_the_newest_first(said: Any):
    code, out, err = said()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Conversations"
    assert lines[1].split() == ["id", "changed", "model", "title"]
    assert [line.split()[0] for line in lines[2:]] == ["3", "2", "1"]
    assert lines[2].endswith("fake-4bit  On cheese")
    assert said("list", "-n", "1")[1].splitlines()[2:] == lines[2:3]


def test_as_json_it_lists_what_a_program_needs(said: Any):
    for words in (("--json",), ("list", "--json"), ("--json", "list")):
        first, *_ = json.loads(said(*words)[1])
        assert (first["id"], first["title"], first["model"]) == (3, "On cheese", "fake-4bit")
        assert first["created"] <= first["updated"]


def test_it_finds_what_was_said_and_where(said: Any):
    out = said("search", "ivy")[1]
    assert [line.split()[:2] for line in out.splitlines()] == [["id", "where"], ["2", "Qwen"]]
    assert {hit["conversation"] for hit in json.loads(said("search", "which", "--json")[1])} == {1, 2}
    assert said("search", "volcano") == (0, "", "qchat: nothing was found\n")


def test_it_shows_a_conversation_by_number_title_and_as_the_latest(said: Any):
    code, out, _ = said("show", "1")
    assert code == 0
    assert out.splitlines() == [
        "Which planets are there?",
        "",
        "You:",
        "Which planets are there?",
        "",
        "Qwen:",
        "Thought: 13 characters",
        "Eight of them.",
    ]
    assert said("show", "#1")[1] == said("show", "which planets")[1] == out
    assert said("show", "latest")[1].startswith("On cheese\n")
    shown = json.loads(said("show", "1", "--json")[1])
    assert [message["text"] for message in shown["messages"]] == [
        "Which planets are there?",
        "Eight of them.",
    ]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("which", "2 conversations begin with 'which': say which by number (2, 1)"),
        ("volcano", "no conversation's title begins with 'volcano'"),
        ("²", "no conversation's title begins with"),
        (" ", "no conversation's title begins with"),
    ],
)
def test_what_is_not_one_conversation_is_a_sentence(said: Any, word: str, sentence: str):
    code, out, err = said("show", word)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("word", ["99", "#99", "9" * 400])
def test_a_number_that_no_conversation_has_is_a_sentence(said: Any, word: str):
    code, out, err = said("show", word)
    assert code
    assert (out, err.count("\n"), "internal" in err) == ("", 1, False)


def test_an_exported_conversation_comes_back_as_another(said: Any, tmp_path: Path):
    path = tmp_path / "planets.json"
    assert said("export", "1", str(path)) == (0, "", f"qchat: written to {path}\n")
    assert said("export", "1", str(path))[0] != 0
    assert said("export", "1", str(path), "--force")[0] == 0
    code, _, err = said("import", str(path))
    assert (code, err) == (0, f"qchat: {path} is conversation 4: Which planets are there?\n")
    assert said("show", "4")[1] == said("show", "1")[1]


@pytest.mark.parametrize("name", ["talk.md", "talk.html"])
def test_it_exports_for_reading(said: Any, tmp_path: Path, name: str):
    assert said("export", "on cheese", str(tmp_path / name))[0] == 0
    assert "Brie." in (tmp_path / name).read_text()


def test_a_file_of_another_kind_is_refused(said: Any, tmp_path: Path):
    code, out, err = said("export", "1", str(tmp_path / "talk.exe"))
    assert code != 0
    assert (out, err.count("\n")) == ("", 1)
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[" * 9999)
    code, out, err = said("import", str(wrong))
    assert code != 0
    assert (out, err.count("\n")) == ("", 1)


def test_it_renames(said: Any, store: Store):
    assert said("rename", "1", "On", "planets") == (0, "", "qchat: conversation 1 is called On planets\n")
    assert store.conversation(1).title == "On planets"


def test_it_deletes_all_or_none_and_brings_back(said: Any, store: Store):
    assert said("rm", "1", "volcano")[0] == 2
    assert len(store.conversations()) == 3
    code, _, err = said("rm", "1", "2")
    assert code == 0
    assert "`qchat sessions restore 2` brings it back" in err
    assert [one.id for one in store.conversations()] == [3]
    assert said("restore", "1") == (0, "", "qchat: brought back: Which planets are there?\n")
    assert {one.id for one in store.conversations()} == {1, 3}
    assert said("restore", "on cheese")[0] == 2


def test_a_limit_below_one_is_refused(said: Any):
    assert "--limit is 0, wanted a number from 1" in said("list", "-n", "0")[2]


def test_control_characters_of_titles_and_texts_never_reach_a_terminal(
    said: Any, store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    number = talk(store, "a\x1b[2Jb", "c\x1b]0;x\x07d", title="\x1b[31mred\nline")
    for words in ((), ("show", str(number)), ("search", "red")):
        out = said(*words)[1]
        assert not set(out) & set("\x1b\x07\r")


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("id", "name"), ("1", "日本"), ("20", "x")]
    assert columns(rows, right=(0,)) == "id  name\n 1  日本\n20  x\n"


@pytest.mark.parametrize(
    ("then", "shown"),
    [
        ("2026-03-05 09:07", "09:07"),
        ("2026-03-04 23:59", "yesterday"),
        ("2026-03-03 09:00", "3 Mar"),
        ("2025-12-31 09:00", "2025-12-31"),
    ],
)
def test_times_are_as_brief_as_they_are_clear(then: str, shown: str):
    now = datetime(2026, 3, 5, 10, 0)
    assert when(datetime.fromisoformat(then).timestamp(), now) == shown


# --- the model of a conversation ---


def test_lists_say_how_many_models_replied(store: Store):
    number = talk(store, "Hi", "Hello")
    store.add_node(number, store.nodes(number)[-1].id, "user", text="And?")
    for name in ("fake-4bit", "other-8bit"):
        store.add_node(number, store.nodes(number)[2].id, "assistant", text="So", model_name=name)
    one = store.conversation(number)
    assert row(one, store.model_names()[number], here=None)[3] == "fake-4bit +1"
    assert row(one, (), here=None)[3] == "fake-4bit"


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("where", ["there", "moved", "gone", "renamed"])
def test_a_conversation_comes_back_to_its_model_or_says_which_one_it_was(
    store: Store, tmp_path: Path, where: str, imported: bool
):
    places = Locations.from_setting([str(tmp_path / "models")])
    folder = tmp_path / {"moved": "models", "renamed": "models"}.get(where, "elsewhere") / "mine-4bit"
    if where != "gone":
        write_checkpoint(folder if where != "renamed" else folder.with_name("mine-4bit-b"))
    last = tmp_path / "elsewhere" / "mine-4bit"
    number = store.create(model=ModelIdentity(name="mine-4bit", folder=str(last)))
    found = replace(store.conversation(number), imported=imported)
    if not imported and where in ("there", "moved"):
        assert model_of(found, places) == str(folder)
        assert describe_other_model(found, folder) == ""
        return
    assert model_of(found, places) is None
    said = describe_other_model(found, BUILT_IN_MODEL)
    assert "mine-4bit" in said and "embedded answers now" in said
    assert ("was imported" in said) == imported
    assert ("no longer on this machine" in said) == (not imported)


def test_going_on_begins_with_the_last_model(store: Store, tmp_path: Path):
    write_checkpoint(tmp_path / "mine")
    launch = Launch(Settings.load({"model": str(BUILT_IN_MODEL)}), session="latest")
    last = ModelIdentity(name="mine", folder=str(tmp_path / "mine"))
    number = store.create(model=last)
    beginning = _beginning(launch, store)
    assert (beginning.model, beginning.conversation, beginning.said) == (last.folder, number, "")
    store.update(number, model=ModelIdentity(name="lost", folder=str(tmp_path / "lost")))
    beginning = _beginning(launch, store)
    assert beginning.model == str(BUILT_IN_MODEL)
    assert beginning.said == (
        "this conversation was last held with lost, which is no longer on this machine; embedded answers now"
    )
    beginning = _beginning(replace(launch, model=str(tmp_path / "mine")), store)
    assert beginning.model == last.folder and "lost" in beginning.said


def test_what_is_kept_of_requests_is_erased_and_nothing_else(said: Any, store: Store):
    folder = store.states_folder
    claim(folder, SERVED, ["a" * 32, "b" * 32])
    claim(folder, "1", ["b" * 32])
    for name in "ab":
        state_path(folder, name * 32).write_bytes(b"x")
    assert said("forget") == (0, "", "qchat: erased what was kept of requests\n")
    assert not state_path(folder, "a" * 32).exists()
    assert state_path(folder, "b" * 32).exists()
