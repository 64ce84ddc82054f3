"""Personas: what they set, what comes back after them, and what is said of bad files."""

import tomllib
from pathlib import Path

import pytest

from qchat.core.errors import UsageError
from qchat.tui.commands import completions
from qchat.tui.text.report import report_text
from qchat.tui.user.personas import personas_dir, read_persona
from qchat.tui.user.settings import Settings
from tests.tui.chat_stage import ChatStage

POET = 'system = "Answer in verse."\ntemperature = 1.2\nthink = false\n'
CRITIC = 'system = "Find what is wrong."\ntop_k = 5\n'


@pytest.fixture(autouse=True)
def folder() -> Path:
    folder = personas_dir()
    folder.mkdir(parents=True)
    (folder / "poet.toml").write_text(POET)
    (folder / "critic.toml").write_text(CRITIC)
    return folder


def values(settings: Settings) -> dict[str, object]:
    return {name: settings[name] for name in ("system", "temperature", "think", "top_k")}


def test_a_persona_sets_prompt_and_settings_and_the_next_replaces_all_of_it(tmp_path: Path):
    stage = ChatStage(tmp_path)
    stage.play(
        "/system Be kind.", "/set temperature 0.5", "/persona poet", "hello", "/persona critic", "hello"
    )
    first, second = stage.fake.asked("send")
    assert first["settings"]["temperature"] == 1.2 and first["settings"]["enable_thinking"] is False
    assert second["settings"] == {"temperature": 0.5, "top_k": 5}
    systems = [asked["text"] for asked in stage.fake.asked("set_system")]
    assert systems == ["Be kind.", "Answer in verse.", "Find what is wrong."]
    assert stage.chat.settings.origin("system") == "persona critic"


def test_off_brings_back_what_was_there_and_keeps_what_was_changed_since(tmp_path: Path):
    stage = ChatStage(tmp_path)
    stage.play("/system Be kind.", "/set temperature 0.5", "/persona poet", "/set think on", "/persona off")
    assert values(stage.chat.settings) == {
        "system": "Be kind.", "temperature": 0.5, "think": True, "top_k": None,
    }  # fmt: skip
    assert stage.chat.settings.origin("temperature") == "/set"
    assert stage.fake.asked("set_system")[-1] == {"text": "Be kind."}
    assert stage.chat.settings.persona == ""


def test_a_persona_without_a_system_prompt_leaves_it(tmp_path: Path, folder: Path):
    (folder / "hot.toml").write_text("temperature = 2\n")
    stage = ChatStage(tmp_path)
    stage.play("/system Be kind.", "/persona poet", "/persona hot")
    assert values(stage.chat.settings)["system"] == "Be kind."
    assert stage.fake.asked("set_system")[-1] == {"text": "Be kind."}


def test_the_present_settings_are_saved_as_a_persona(tmp_path: Path, folder: Path):
    stage = ChatStage(tmp_path)
    stage.front.answers = [False, True]
    lines = ("/system Be kind.", "/set temperature 0.5", "/persona save mine", "/persona save poet")
    front = stage.play(*lines, "/persona save poet")
    saved = tomllib.loads((folder / "mine.toml").read_text())
    assert saved == {"system": "Be kind.", "temperature": 0.5}
    assert tomllib.loads((folder / "poet.toml").read_text()) == saved
    assert ("info", "nothing was written") in front.notes
    assert read_persona("mine") == saved


def test_on_the_command_line_flags_come_before_a_persona_and_it_before_files(tmp_path: Path):
    (tmp_path / ".qchat.toml").write_text("temperature = 0.1\ntop_k = 3\n")
    settings = Settings.load(
        {"think": True}, tmp_path, {}, ["seed=7"], persona=("poet", read_persona("poet"))
    )
    assert (settings["temperature"], settings["top_k"], settings["think"], settings["seed"]) == (
        1.2,
        3,
        True,
        7,
    )
    assert settings.session()["system"] == "Answer in verse."
    settings.put_on("", {}, settings.before_persona())
    assert (settings["temperature"], settings["think"], settings["system"]) == (0.1, True, None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("temprature = 1", "did you mean temperature?"),
        ("temperature = 'hot'", "temperature is 'hot', wanted a number"),
        ("model = '/x'", "a persona cannot set model, only system"),
        ("not toml", "is not TOML"),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_name(tmp_path: Path, folder: Path, text: str, sentence: str):
    (folder / "bad.toml").write_text(text)
    stage = ChatStage(tmp_path)
    front = stage.play("/persona bad")
    ((kind, said),) = front.notes
    assert kind == "error" and sentence in said and "bad.toml" in said and "\n" not in said
    assert not stage.chat.settings.persona
    listed = ChatStage(tmp_path).play("/persona").said
    assert "poet" in listed and "bad" in listed
    with pytest.raises(UsageError, match=r"bad\.toml"):
        read_persona("bad")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/persona pot", "did you mean poet?"),
        ("/persona off", "no persona is on"),
        ("/persona save", "cannot be the name"),
        ("/persona save a/b", "cannot be the name"),
        ("/persona save off", "means something else"),
        ("/persona save new", "there is nothing to save"),
        ("/persona poet critic", "is no persona"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(tmp_path: Path, line: str, sentence: str):
    front = ChatStage(tmp_path).play(line)
    assert sentence in front.said and front.notes[0][0] == "error"


def test_personas_are_listed_with_what_they_set_and_completed(tmp_path: Path):
    stage = ChatStage(tmp_path)
    front = stage.play("/persona poet", "/persona")
    listed = report_text(front.all("report")[0])
    assert "●, persona poet, settings think off · temperature 1.2, system prompt Answer in verse." in listed
    assert "critic" in listed
    assert [one.line for one in completions("/persona po", stage.chat)] == ["/persona poet"]
    assert [one.line for one in completions("/persona save c", stage.chat)] == ["/persona save critic"]


def test_before_a_model_is_loaded_a_persona_waits_for_it(tmp_path: Path):
    async def load(stage: ChatStage) -> None:
        await stage.chat.load("/models/fake-4bit")

    stage = ChatStage(tmp_path)
    stage.play("/persona poet", load, load="")
    assert stage.fake.asked("load")[0]["system"] == "Answer in verse."
