"""The history of prompts: on disk, shared, bounded, private."""

import json
import stat
from pathlib import Path

from qchat.tui.user import history as module
from qchat.tui.user.history import History


def test_entries_outlive_the_run_in_a_file_of_the_owner_alone(tmp_path: Path):
    path = tmp_path / "history"
    first = History(path)
    first.add("one")
    first.add("two\nlines ✓")
    assert History(path).entries == ["one", "two\nlines ✓"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_runs_append_to_one_file(tmp_path: Path):
    path = tmp_path / "history"
    one, other = History(path), History(path)
    one.add("a")
    other.add("b")
    one.add("c")
    assert History(path).entries == ["a", "b", "c"]


def test_blank_and_repeated_prompts_are_not_kept(tmp_path: Path):
    history = History(tmp_path / "history")
    for text in ("a", "a", "  \n", "b", "a"):
        history.add(text)
    assert history.entries == History(history.path).entries == ["a", "b", "a"]


def test_lines_that_are_no_prompts_are_passed_over(tmp_path: Path):
    path = tmp_path / "history"
    path.write_bytes(b'\xff\xfe\nnot json\n{"a": 1}\n"good"\n' + b"[" * 5000 + b"\n")
    assert History(path).entries == ["good"]


def test_a_file_that_grew_too_long_is_begun_anew_with_the_newest(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "KEPT_NBYTES", 1000)
    path = tmp_path / "history"
    path.write_text("".join(json.dumps(f"prompt {n}") + "\n" for n in range(200)))
    entries = History(path).entries
    assert entries[-1] == "prompt 199"
    assert path.stat().st_size <= 520
    assert History(path).entries[-1] == "prompt 199"


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_chat(tmp_path: Path):
    history = History(tmp_path / "missing" / "history")
    history.add("a")
    assert history.entries == ["a"]


def test_searching_finds_the_newest_first_and_each_once():
    history = History()
    for text in ("Paris", "Rome", "paris again", "Rome", "Paris"):
        history.add(text)
    assert history.search("PAR") == ["Paris", "paris again"]
