"""A schema in the chat: the replies it goes with, where it is shown, what the real engine then answers."""

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qchat.core import BUILT_IN_MODEL
from qchat.tui.commands import completions, perform
from qchat.tui.text.report import report_text
from qchat.tui.user.settings import Settings
from tests.tui.chat_stage import ChatStage
from tests.tui.running_app import Running, chatting

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Berlin"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def city(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file city.json in the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "city.json"
    path.write_text(json.dumps(CITY))
    return path


def schemas(stage: ChatStage, method: str) -> list[Any]:
    """The schema of each reply that was asked for by `method`; "none" where it has no such setting."""
    return [one["settings"].get("schema", "none") for one in stage.fake.asked(method)]


def test_every_reply_has_the_schema_until_it_is_off(tmp_path: Path):
    stage = ChatStage(tmp_path)
    front = stage.play("one", "/schema city.json", "two", "/retry", "/edit 1 three", "/schema off", "four")
    assert not front.all("error")
    assert schemas(stage, "send") == ["none", CITY, "none"]
    assert schemas(stage, "retry") == schemas(stage, "edit") == [CITY]
    assert (
        "answers satisfy the schema in" in front.said
        and "answers may be anything from the next" in front.said
    )


def test_a_retry_may_have_a_schema_of_its_own_or_none(tmp_path: Path):
    stage = ChatStage(tmp_path)
    front = stage.play("one", "/retry schema=city.json", "/schema city.json", "/retry schema=off")
    assert not front.all("error")
    assert schemas(stage, "retry") == [CITY, None]


def test_alone_it_shows_what_is_set(tmp_path: Path, city: Path):
    front = ChatStage(tmp_path).play(
        "/schema", "/schema city.json", "/schema", "/show config", "/show parameters"
    )
    none, schema, config, parameters = map(report_text, front.all("report"))
    assert "there is none" in none
    assert f"Schema · {city}" in schema and '"enum": [' in schema
    assert f"name schema, value {city}, from /schema" in config
    assert f"name schema, value {city}, from you, wanted a file with a JSON schema, or off" in parameters


@pytest.mark.parametrize("line", ["/schema", "/set schema", "/retry schema="])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        ("no JSON", "is not valid JSON"),
        ("[]", "wanted an object"),
        ('{"type": "name"}', "Invalid type: name"),
        ('{"not": {}}', 'Unimplemented keys: ["not"]'),
        (" " * (5 << 20), "is larger than"),
    ],
)
def test_a_bad_file_is_one_sentence_and_leaves_the_setting(
    tmp_path: Path, line: str, content: str | None, words: str
):
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    stage = ChatStage(tmp_path)
    front = stage.play("one", "/schema city.json", f"{line}{'' if line.endswith('=') else ' '}bad.json")
    (error,) = front.all("error")
    assert error.startswith(f"{line.split()[0]}: schema is 'bad.json': ") and words in error
    assert stage.chat.settings.reply() == {"schema": CITY}
    assert not stage.fake.asked("retry")


def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    (error,) = ChatStage(tmp_path).play("/schema city.json").all("error")
    assert "extra `structured`" in error


def test_its_words_are_completed(tmp_path: Path):
    chat = ChatStage(tmp_path).chat
    assert [one.line for one in completions("/schema ", chat)][:2] == ["/schema off", "/schema city.json"]
    assert [one.line for one in completions("/schema ci", chat)] == ["/schema city.json"]


def test_a_summary_is_text_and_programs_choose_their_own_form(tmp_path: Path):
    async def serve(stage: ChatStage) -> None:
        await perform("/serve --port 0", stage.chat, stage.front)
        assert stage.chat.server is not None
        backend: Any = stage.chat.server
        assert backend._backend.settings.get("schema") is None

    stage = ChatStage(tmp_path)
    front = stage.play("/schema city.json", "one", "two", "/compact", serve)
    assert not front.all("error")
    assert schemas(stage, "send") == [CITY, CITY, None]


def test_the_status_row_names_the_file(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        def row() -> str:
            return it.screen.status_row.render_line(0).text

        await it.idle()
        assert "schema" not in row()
        for line, shown in (
            ("/schema city.json", True),
            ("/schema off", False),
            ("/set schema city.json", True),
        ):
            await it.say(line)
            await it.until(lambda shown=shown: ("schema city.json" in row()) == shown)


def test_a_schema_of_the_command_line_is_named_from_the_start(tmp_path: Path):
    @chatting(tmp_path, schema="city.json")
    async def check(it: Running) -> None:
        await it.idle()
        await it.until(lambda: "schema city.json" in it.screen.status_row.render_line(0).text)


@pytest.mark.slow
def test_every_answer_on_every_branch_satisfies_it(tmp_path: Path):
    stage = ChatStage(tmp_path, real=True)
    for name, value in (("temperature", 1.5), ("think", True), ("thinking_budget", 12), ("seed", 3)):
        stage.chat.settings.change(name, value, "test")
    answers: list[str] = []

    async def collect(stage: ChatStage) -> None:
        answers.append(stage.chat.state.turns[-1].answer)

    lines = (
        "Which city?",
        "/retry",
        "And now?",
        "/edit 1 A capital?",
        "/retry temperature=0",
        "/switch 2",
        "Why?",
    )
    scenes = [scene for line in lines for scene in (line, collect)]
    front = stage.play(
        "/schema city.json", *scenes, "/schema off", "Say hello.", collect, load=str(BUILT_IN_MODEL)
    )
    assert not front.all("error")
    for answer in answers[:-1]:
        jsonschema.validate(json.loads(answer), CITY)
    assert not answers[-1].startswith("{")


def test_settings_hold_what_was_read_when_the_file_was_named(city: Path):
    settings = Settings.load({"schema": "city.json"})
    city.write_text("{}")
    assert settings.reply() == {"schema": CITY}
    assert settings.replaced("test", schema=settings["schema"]).reply() == {"schema": CITY}
