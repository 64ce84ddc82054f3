"""What tasks do in a chat besides: the open conversation and the loaded model are looked after."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qchat.core import Store
from qchat.core.hub import library
from tests.checkpoints import write_checkpoint
from tests.tui.chat_stage import ChatStage, at_rest
from tests.tui.conversing import talk
from tests.tui.fake_front import FakeFront
from tests.tui.task_results import results


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Conversation 1, which the scripted engine is in, and 2."""
    with Store(tmp_path / "store.db") as opened:
        talk(opened, "Which planets are there?", "Eight of them.")
        talk(opened, "Name a cheese.", "Brie.", title="On cheese")
        yield opened


def test_a_conversation_is_searched_shown_exported_and_deleted(tmp_path: Path, store: Store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    front = ChatStage(tmp_path, store=store).play(
        "/sessions show 2", "/sessions list the brie", "/sessions what's eight", "/sessions export 2 a.md",
        "/sessions rm 2", "/sessions restore 2", "/sessions import a.json",
    )  # fmt: skip
    assert "Brie." in front.said and "written to" in front.said
    assert "`/sessions restore 2` brings it back" in front.said and "brought back: On cheese" in front.said
    assert (tmp_path / "a.md").exists()
    unlisted, unread = front.all("error")
    assert "unrecognized arguments" in unlisted and "a.json" in unread
    assert {one.id for one in store.conversations()} == {1, 2}


def test_words_that_are_no_action_are_searched_for_as_they_are(tmp_path: Path, store: Store):
    front = ChatStage(tmp_path, store=store).play("/sessions which planets", "/sessions it's", load="")
    assert "Which planets are there?" in front.said and "nothing was found" in front.said
    assert not front.all("error")


def test_the_open_conversation_is_renamed_by_the_engine_and_not_deleted(tmp_path: Path, store: Store):
    stage = ChatStage(tmp_path, store=store)
    front = stage.play("/sessions rename 1 On planets", "/sessions rename 2 Cheeses", "/sessions rm 1")
    assert store.conversation(1).title == "On planets" and store.conversation(2).title == "Cheeses"
    assert [one["title"] for one in stage.fake.asked("rename")] == ["On planets"]
    assert front.all("error") == ["this is the conversation you are in: begin another one first"]


def test_a_model_is_deleted_after_a_yes_but_never_the_loaded_one(tmp_path: Path, monkeypatch):
    write_checkpoint(tmp_path / "models/tiny")
    write_checkpoint(tmp_path / "models/other")
    monkeypatch.setattr(library, "cache_folder", lambda: tmp_path / "hub")
    front = FakeFront(False, True)
    stage = ChatStage(tmp_path, front=front)
    stage.play(
        f"/load {tmp_path}/models/other", "/models rm other --yes", "/models rm tiny", "/models rm tiny"
    )
    assert front.all("error") == ["other is loaded: load another model first"]
    assert len(front.all("confirm")) == 2 and front.all("confirm")[0].endswith("Delete it?")
    assert (tmp_path / "models/other").exists() and not (tmp_path / "models/tiny").exists()
    assert "nothing was changed" in front.said and "deleted tiny" in front.said


def test_a_conversion_is_planned_and_a_config_is_enough(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "plan", "result": results()["plan"]})
    (tmp_path / "config.json").write_text("{}")
    stage.play(f"/convert {tmp_path}/config.json --plan --bandwidth 800", at_rest)
    (asked,) = stage.fake.asked("plan")
    assert (asked["source"], asked["bandwidth"]) == (f"{tmp_path}/config.json", 800)
    assert asked["options"]["bits"] == 4, "as without --plan"
    assert not (tmp_path / "models").exists()


def test_memory_is_planned_for_the_loaded_model(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "memory_plan", "result": results()["memory_plan"]})
    stage.play("/plan --context 512 --kv-bits 8 --image-tokens 256", at_rest)
    asked = {"model": "/models/fake-4bit", "context": 512, "kv_bits": 8, "image_tokens": 256}
    assert stage.fake.asked("memory_plan") == [asked]


def test_a_notice_of_the_engine_stays_below_the_result(tmp_path: Path):
    notice = {"event": "notice", "text": "the measurement cannot be stored"}
    stage = ChatStage(tmp_path, {"method": "eval", "events": [notice], "result": results()["eval"]})
    stage.play("/eval embedded", at_rest)
    last = stage.chat.jobs[0].report().parts[-1]
    assert getattr(last, "lines", None) == ["the measurement cannot be stored"]
