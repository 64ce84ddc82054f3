"""Every way to change a setting during a run: `/show config` shows the new value and where it came from."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qchat.core import BUILT_IN_MODEL
from qchat.core.errors import UsageError
from qchat.tui.chat.controller import Chat
from qchat.tui.chat.window import Window
from qchat.tui.commands.settings import AT_START, config_report
from qchat.tui.text.report import Table
from qchat.tui.user.paths import config_file
from qchat.tui.user.settings import KEYS, PANE_NAMES, Settings
from tests.tui.chat_stage import ChatStage
from tests.tui.fake_engine import MODEL
from tests.tui.fake_front import FakeFront
from tests.tui.running_app import Running, chatting

# by setting, the lines that change it and what `/show config` then has as its value and its origin
CHANGES: dict[str, list[tuple[str, str, str]]] = {
    "model": [
        ("/load embedded", str(BUILT_IN_MODEL), "/load"),
        ("/model embedded", str(BUILT_IN_MODEL), "/model"),
        ("/set model embedded", str(BUILT_IN_MODEL), "/model"),
    ],
    "models_dir": [("/set models_dir /else", "'/else'", "/set")],
    "system": [
        ("/system Be brief.", "Be brief.", "/system"),
        ("/set system Be brief.", "Be brief.", "/set"),
        ("/system @role.txt", "Be kind.", "/system"),
    ],
    "think": [
        ("/think off", "off", "/think"),
        ("/think 64", "on", "/think"),
        ("/set think on", "on", "/set"),
        ("/set think", "on", "/set"),
        ("/set nothink", "off", "/set"),
        ("/set enable_thinking off", "off", "/set"),
    ],
    "effort": [("/effort high", "high", "/effort"), ("/set effort low", "low", "/set")],
    "thinking_budget": [
        ("/budget 99", "99", "/budget"),
        ("/think 64", "64", "/think"),
        ("/set budget 7", "7", "/set"),
    ],
    "drafts": [("/set drafts 2", "2", "/set")],
    "max_tokens": [("/set parameter num_predict 5", "5", "/set")],
    "schema": [
        ("/schema city.json", "{here}/city.json", "/schema"),
        ("/set schema city.json", "{here}/city.json", "/set"),
    ],
    "stop_loops": [("/set stop_loops off", "off", "/set")],
    "stop": [("/set stop END", "'END'", "/set")],
    "temperature": [("/set temp 0.25", "0.25", "/set")],
    "top_p": [("/set top-p 0.5", "0.5", "/set")],
    "top_k": [("/set top_k 7", "7", "/set")],
    "min_p": [("/set min_p 0.125", "0.125", "/set")],
    "repetition_penalty": [("/set repeat_penalty 1.5", "1.5", "/set")],
    "presence_penalty": [("/set presence_penalty -1", "-1", "/set")],
    "frequency_penalty": [("/set frequency_penalty 1", "1", "/set")],
    "seed": [("/set seed 3", "3", "/set")],
    "tools": [
        ("/set tools calculate,shell", "'shell' 'calculate'", "/set"),
        ("/tools on calculate", "'calculate'", "/tools on"),
    ],
    "max_tool_rounds": [("/set max_tool_rounds 3", "3", "/set")],
    "show_thinking": [
        ("/think show", "on", "/think"),
        ("/set show_thinking on", "on", "/set"),
    ],
    "history": [("/history strip", "strip", "/history"), ("/set history strip", "strip", "/set")],
    "context_limit": [("/set num_ctx 4096", "4096", "/set")],
    "snapshot_budget": [("/set snapshot_budget 2 KB", "2000", "/set")],
    "image_tokens": [("/set image_tokens 256", "256", "/set")],
    "kv_bits": [("/set kv_bits 8", "8", "/set")],
    "theme": [("/theme day", "day", "/theme"), ("/set theme day", "day", "/set")],
    "pictures": [
        ("/set pictures blocks", "blocks", "/set"),
        ("/set pictures off", "off", "/set"),
        ("/set pictures default", "auto", "default"),
    ],
    "panes": [("/panes", "off", "/panes"), ("/set panes off", "off", "/set")],
    "shown_panes": [
        ("/panes speed", "'memory' 'context' 'thinking' 'branches'", "/panes"),
        ("/set shown_panes context,speed", "'speed' 'context'", "/set"),
    ],
    "live_bench": [("/bench live on", "on", "/bench live"), ("/set live_bench on", "on", "/set")],
    "notify": [("/set notify off", "off", "/set")],
    "window_title": [("/set window_title off", "off", "/set")],
    "copy_on_select": [("/set copy_on_select off", "off", "/set")],
    "mouse": [("/mouse off", "off", "/mouse"), ("/set mouse off", "off", "/set")],
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the files that the lines above name."""
    monkeypatch.chdir(tmp_path)
    Path("role.txt").write_text("Be kind.\n")
    Path("city.json").write_text(json.dumps({"type": "string"}))
    return tmp_path


def row(chat: Chat, name: str) -> tuple[str, ...]:
    """Return the value and the origin that `/show config` has for a setting."""
    (table,) = config_report(chat).parts
    assert isinstance(table, Table)
    (found,) = (row for row in table.rows if row[0] == name)
    return tuple(found[1:])


def test_every_setting_that_a_run_can_change_is_tried_here():
    assert CHANGES.keys() == KEYS.keys() - set(AT_START)


@pytest.mark.parametrize(
    ("name", "line", "value", "origin"),
    [(name, *change) for name, changes in CHANGES.items() for change in changes],
)
def test_show_config_has_what_a_command_changed(tmp_path, here, name, line, value, origin):
    stage = ChatStage(tmp_path)
    front = stage.play(line, "/show config")
    assert not front.all("error")
    shown, where = row(stage.chat, name)
    assert (shown, where) == (value.replace("{here}", str(here)), origin)
    assert f"name {name}, value {shown}, from {origin}" in front.said


@pytest.mark.parametrize("name", sorted(KEYS.keys() - {"model", *AT_START}))
def test_a_default_restored_has_no_other_origin(tmp_path: Path, name: str):
    stage = ChatStage(tmp_path)
    stage.play(CHANGES[name][0][0], f"/set {name} default")
    recommended = {parameter for parameter, value in MODEL["parameters"].items() if value is not None}
    assert row(stage.chat, name)[1] == ("the model" if name in recommended else "default")


@pytest.mark.parametrize("line", ["/set theme nosuch", "/history strip", "/system Be brief.", "/set top_p 2"])
def test_a_change_that_fails_leaves_the_setting(tmp_path: Path, line: str):
    """No model is loaded, and the theme is missing."""

    class WithoutThemes(FakeFront):
        def set_theme(self, name: str) -> None:
            raise UsageError(f"there is no theme {name}")

    stage = ChatStage(tmp_path, front=WithoutThemes())
    before = dict(stage.chat.settings)
    front = stage.play(line, load="")
    assert len(front.all("error")) == 1
    assert dict(stage.chat.settings) == before


def test_what_a_stored_conversation_brings_is_shown_as_its_own(tmp_path: Path):
    state = {"conversation": 7, "title": "", "system": "Be a pirate.", "history": "strip", "tokens": 0}
    result = {"state": {**state, "context_limit": 1000, "leaf": None, "turns": [], "branches": []}}
    stage = ChatStage(tmp_path, {"method": "open", "result": result})

    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        assert (row(chat, "system"), row(chat, "history")) == (("default", "default"),) * 2
        await chat.open(7)
        assert row(chat, "system") == ("Be a pirate.", "the conversation")
        assert row(chat, "history") == ("strip", "the conversation")

    stage.play(scene)


def test_a_system_prompt_taken_away_stays_away_when_another_model_is_loaded(tmp_path: Path):
    stage = ChatStage(tmp_path)
    stage.chat.settings.change("system", "Be brief.", "config.toml")
    stage.play('/system ""', "/load embedded")
    assert [one.get("system") for one in stage.fake.asked("load")] == ["Be brief.", None]


def test_a_restart_with_less_context_sets_the_limit_of_every_later_load(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "send", "die": "SIGKILL"})

    async def scene(stage: ChatStage) -> None:
        stage.fake.write()
        with pytest.raises(Exception, match="SIGKILL"):
            await stage.chat.send("one")
        await stage.chat.restart(context_limit=1024)
        await stage.chat.load("/models/b")
        assert row(stage.chat, "context_limit") == ("1024", "the restart")

    stage.play(scene)
    assert [one["context_limit"] for one in stage.fake.asked("load")] == [None, 1024, 1024]


def test_front_ends_share_one_object_and_none_keeps_a_copy(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        assert it.app._settings is it.chat.settings
        it.chat.settings.change("theme", "day", "test")
        assert it.app._settings["theme"] == "day"


@pytest.mark.slow
def test_keys_and_the_theme_picker_change_the_settings_too(tmp_path: Path):
    @chatting(tmp_path, show_thinking=False)
    async def check(it: Running) -> None:
        await it.pilot.press("ctrl+t")
        assert row(it.chat, "think") == ("off", "ctrl+t")
        await it.pilot.press("ctrl+t")
        assert row(it.chat, "thinking_budget") == ("1024", "ctrl+t")
        await it.pilot.press("ctrl+o")
        assert row(it.chat, "show_thinking") == ("on", "ctrl+o")
        assert it.screen.transcript.thoughts == "open"
        await it.say("/think hide")
        await it.until(lambda: it.screen.transcript.thoughts == "live")
        assert row(it.chat, "show_thinking") == ("off", "/think")
        await it.say("/theme")
        await it.until(lambda: it.app.screen is not it.screen)
        await it.pilot.press("home", "enter")
        await it.until(lambda: it.app.screen is it.screen and row(it.chat, "theme")[1] == "/theme")
        assert row(it.chat, "theme")[0] == it.app.theme != "night"


def test_a_theme_that_is_missing_is_an_error_and_no_change(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.say("/set theme nihgt")
        await it.until(lambda: it.said)
        assert it.said == [("error", "there is no theme nihgt; did you mean night?")]
        assert row(it.chat, "theme") == ("night", "--theme")


def test_what_was_changed_on_the_full_screen_holds_line_by_line(tmp_path: Path, monkeypatch):
    """/plain hands the run's settings on."""
    from qchat.tui.cli import launch

    settings, seen = Settings(), []

    class App:
        failure, return_code = None, 0
        chat_screen = SimpleNamespace(window=Window(lambda _: None))

        def __init__(self, _make_chat: Any, *, settings: Settings, **_: Any):
            self.chat, self._settings = ChatStage(tmp_path).chat, settings

        def run(self, **_: Any) -> str:
            self._settings.change("temperature", 0.5, "/set")
            return "plain"

    def run_lines(_make_chat: Any, *, settings: Settings, **_: Any) -> tuple[int, None]:
        seen.append({name: settings.origin(name) for name in ("temperature", "plain")})
        return 0, None

    monkeypatch.setattr(launch, "is_full", lambda _: True)
    monkeypatch.setattr(launch, "spawn_early", lambda *_: None)
    monkeypatch.setattr("qchat.tui.screens.app.QchatApp", App)
    monkeypatch.setattr("qchat.tui.plain.repl.run", run_lines)
    assert launch.run(launch.Launch(settings=settings, model="embedded")) == 0
    assert seen == [{"temperature": "/set", "plain": "/plain"}]


# --- saved as the default ---


def test_a_setting_is_saved_on_request_and_unsaved_by_its_default(tmp_path: Path):
    stage = ChatStage(tmp_path)
    path = config_file()
    front = stage.play("/set temperature 0.5 --save", "/set think off --save", "/set measure 120 --save")
    assert not front.all("error")
    assert f"temperature is saved in {path}" in front.said
    assert tomllib.loads(path.read_text()) == {"temperature": 0.5, "think": False, "measure": 120}
    assert row(stage.chat, "temperature") == ("0.5", "/set")
    assert row(stage.chat, "measure") == ("100", "default")  # takes effect when qchat starts
    front = ChatStage(tmp_path).play("/set temperature default --save", "/set seed default --save")
    assert not front.all("error")
    assert f"{path} no longer sets temperature" in front.said
    assert tomllib.loads(path.read_text()) == {"think": False, "measure": 120}


def test_a_schema_is_saved_by_its_whole_path_and_off_overrides_it(tmp_path: Path, here: Path):
    front = ChatStage(tmp_path).play("/set schema city.json --save")
    assert not front.all("error")
    assert tomllib.loads(config_file().read_text()) == {"schema": f"{here}/city.json"}
    assert Settings.load(cwd=tmp_path / "elsewhere").reply() == {"schema": {"type": "string"}}
    assert Settings.load({"schema": "off"}).reply() == {}
    assert not ChatStage(tmp_path).play("/set schema off --save").all("error")
    assert tomllib.loads(config_file().read_text()) == {"schema": "off"}
    assert Settings.load().reply() == {}


def test_a_change_is_saved_only_on_request_and_only_if_it_succeeds(tmp_path: Path):
    front = ChatStage(tmp_path).play("/set seed 3", "/set seed x --save", "/set model nosuch --save")
    assert len(front.all("error")) == 2
    assert not config_file().exists()


def test_panes_are_remembered_and_one_is_shown_alone_after_all_were_hidden(tmp_path: Path):
    stage = ChatStage(tmp_path)
    front = stage.play("/panes", "/panes speed", "/panes context", "/panes speed", "/panes context")
    assert front.all("show_panes") == [[], ["speed"], ["speed", "context"], ["context"], []]
    kept = Settings.load(cwd=tmp_path)
    assert (kept["panes"], kept["shown_panes"]) == (False, list(PANE_NAMES))
    front = ChatStage(tmp_path).play("/panes on", "/panes branches", "/panes nosuch")
    assert front.all("show_panes")[-1] == list(PANE_NAMES[:-1])
    assert "wanted one of speed, memory" in front.all("error")[-1]
    kept = Settings.load(cwd=tmp_path)
    assert (kept["panes"], kept["shown_panes"]) == (True, list(PANE_NAMES[:-1]))


def test_panes_are_refused_where_there_are_none(tmp_path: Path):
    class LineByLine(FakeFront):
        def show_panes(self, names: Sequence[str]) -> bool:
            del names
            return False

    stage = ChatStage(tmp_path, front=LineByLine())
    front = stage.play("/panes off")
    assert front.all("error") == ["/panes: only the full-screen app has panes"]
    assert stage.chat.settings["panes"] is True
