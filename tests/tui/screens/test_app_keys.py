"""The app where a slip of the finger would lose or mislead: editor, completion, find, labels."""

from pathlib import Path

import pytest
from textual.drivers.headless_driver import HeadlessDriver

from qchat.tui.user import editor
from tests.tui.running_app import Running, chatting, quick_keys

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")


# --- the editor ---


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whether the terminal was lent out and taken back."""
    calls: list[str] = []
    monkeypatch.setattr(HeadlessDriver, "can_suspend", True)
    monkeypatch.setattr(HeadlessDriver, "suspend_application_mode", lambda _: calls.append("lent"))
    monkeypatch.setattr(HeadlessDriver, "resume_application_mode", lambda _: calls.append("back"))
    return calls


@pytest.mark.parametrize("command", ["no-such-editor --wait", "/nonexistent/editor", "'open", "''"])
@pytest.mark.parametrize("way", ["ctrl+g", "/edit"])
def test_an_editor_that_cannot_start_leaves_the_screen_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lent: list[str], command: str, way: str
):
    monkeypatch.setenv("VISUAL", "")
    monkeypatch.setenv("EDITOR", command)

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        if way == "/edit":
            await it.say(way)
        else:
            await it.pilot.press(*"draft", way)
        await it.until(lambda: it.said)
        kind, sentence = it.said[0]
        assert kind == "error"
        assert "cannot be started" in sentence or "$EDITOR is not a command" in sentence
        assert not lent
        assert it.prompt.text == ("" if way == "/edit" else "draft")


@pytest.mark.parametrize("failure", [editor.UsageError("the editor left no text"), OSError(5, "broken")])
def test_whatever_fails_while_the_terminal_is_lent_the_app_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lent: list[str], failure: Exception
):
    def fail(*_: object) -> int:
        raise failure

    monkeypatch.setenv("VISUAL", "true")
    monkeypatch.setattr(editor, "open_file", fail)

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.pilot.press(*"draft", "ctrl+g")
        await it.until(lambda: it.said)
        assert lent == ["lent", "back"]
        assert it.said[0][0] == "error"
        await it.pilot.press("!")
        await it.until(lambda: it.prompt.text == "draft!")


# --- completion ---


@pytest.mark.parametrize(
    ("keys", "ran"),
    [
        ([*"/stat", "tab", "enter"], "/stats"),
        ([*"/thin", "tab", "enter"], "/think"),
        ([*"/theme", "tab", "enter"], "/theme"),
        ([*"/stat", "tab", "down", "up", "enter"], "/stats json"),
        ([*"/thin", "tab", "down", "enter"], "/think off"),
        ([*"/stats ", "enter"], "/stats"),
        ([*"/stat", "enter"], "/stats"),
    ],
)
def test_enter_runs_the_line_and_a_row_only_after_an_arrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], ran: str
):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        lines: list[str] = []
        monkeypatch.setattr(it.screen, "run_line", lines.append)
        await it.pilot.press(*keys)
        await it.until(lambda: lines)
        assert [line.strip() for line in lines] == [ran]
