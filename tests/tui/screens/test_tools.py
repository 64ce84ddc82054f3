"""Tools in the app: the panel that asks, the status row, the folded results, esc."""

from pathlib import Path

import pytest
from textual.widgets import OptionList, Static

from qchat.tui.screens import consent
from qchat.tui.screens.consent import AskTool
from qchat.tui.tools.rounds import CANCELLED
from qchat.tui.widgets.transcript.tool_blocks import Results, Tools
from tests.tui.running_app import Running, chatting, quick_keys
from tests.tui.tools.mcp_stage import needs_mcp, stdio_command
from tests.tui.tools.scene import ANSWER, call, work_in

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, monkeypatch, notes="eggs\nmilk")


@pytest.fixture(autouse=True)
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent, "GUARD_SECONDS", 0.0)


async def asked(it: Running, text: str = "go") -> AskTool:
    """Say something, and return the panel that then asks."""
    await it.say(text)
    await it.until(lambda: isinstance(it.app.screen, AskTool) and it.app.screen.query("#reason"))
    assert isinstance(it.app.screen, AskTool)
    return it.app.screen


def shown(panel: AskTool) -> str:
    return "\n".join(str(part.render()) for part in panel.query(Static))


def results(it: Running) -> list[list[str]]:
    return [one["results"] for one in it.engine.asked("answer_tools")]


def test_the_panel_shows_the_call_and_its_first_option_allows_it_once(tmp_path: Path):
    @chatting(tmp_path, call("read_file", path="notes.txt"), ANSWER, tools=["read_file"])
    async def check(it: Running) -> None:
        for _ in range(2):
            panel = await asked(it)
            assert "The model wants to call read_file" in shown(panel)
            await it.until(lambda panel=panel: "path: notes.txt" in shown(panel))
            await it.pilot.press("1")
            await it.idle()
        assert results(it) == [["eggs\nmilk"]] * 2


@pytest.mark.parametrize(("key", "again"), [("2", True), ("3", False)])
def test_consent_lasts_as_long_as_was_chosen(tmp_path: Path, key: str, again: bool):
    @chatting(tmp_path, call("read_file", path="notes.txt"), ANSWER, tools=["read_file"])
    async def check(it: Running) -> None:
        await asked(it)
        await it.pilot.press(key)
        await it.idle()
        await it.ask("once more")
        await it.say("/new")
        await it.until(lambda: not it.chat.state.turns)
        await it.idle()
        if again:
            await asked(it)
            await it.pilot.press("1")
        else:
            await it.say("go")
        await it.until(lambda: len(results(it)) == 3)
        await it.idle()


def test_a_refusal_with_its_reason_reaches_the_model(tmp_path: Path, here: Path):
    @chatting(tmp_path, call("shell", command="touch made"), ANSWER, tools=["shell"])
    async def check(it: Running) -> None:
        panel = await asked(it)
        assert panel.query_one(OptionList).option_count == 3, "a command is asked about every time"
        await it.pilot.press("2", "3")
        assert it.app.screen is panel
        await it.pilot.press("w")
        await it.pilot.press(*"not now", "enter")
        await it.idle()
        await asked(it)
        await it.pilot.press("n")
        await it.idle()
        await asked(it)
        await it.pilot.press("escape")
        await it.idle()
        refused = "Error: the user refused this call"
        assert results(it) == [[f"{refused}: not now"], [refused], [refused]]
        assert not (here / "made").exists()


def test_keys_that_were_meant_for_the_prompt_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(consent, "GUARD_SECONDS", 3600.0)

    @chatting(tmp_path, call("shell", command="touch made"), ANSWER, tools=["shell"])
    async def check(it: Running) -> None:
        panel = await asked(it)
        await it.pilot.press("1", "n", "w", "escape", "enter")
        assert it.app.screen is panel and not results(it)
        it.chat.stop()
        await it.idle()
        assert results(it) == [[CANCELLED]]
        assert it.app.screen is it.screen


def test_long_arguments_are_folded_until_f_shows_them_all(tmp_path: Path):
    command = "\n".join(f"echo line {number}" for number in range(30))

    @chatting(tmp_path, call("shell", command=command), ANSWER, tools=["shell"])
    async def check(it: Running) -> None:
        panel = await asked(it)
        await it.until(lambda: "▸ 22 more lines" in shown(panel))
        assert "echo line 29" not in shown(panel)
        await it.pilot.press("f")
        await it.until(lambda: "echo line 29" in shown(panel))
        await it.pilot.press("n")
        await it.idle()


def test_a_running_call_is_in_the_status_row_and_esc_cancels_it(tmp_path: Path, here: Path):
    @chatting(tmp_path, call("shell", command="touch begun; sleep 600"), ANSWER, tools=["shell"])
    async def check(it: Running) -> None:
        await asked(it)
        await it.pilot.press("1")
        await it.until((here / "begun").exists)
        row = it.screen.status_row.render_line(0).text
        assert "shell" in row and "esc to cancel" in row
        await it.pilot.press("escape")
        await it.idle()
        assert results(it) == [[CANCELLED]]
        assert it.chat.state.turns[-1].answer == "There."


def text_of(it: Running) -> str:
    return "\n".join(it.screen.transcript.render_line(y).text for y in range(26))


@needs_mcp
def test_results_are_folded_with_time_and_size_and_open_without_escape_sequences(tmp_path: Path):
    program, *arguments = stdio_command()
    servers = {"fake": {"command": program, "args": arguments}}

    @chatting(tmp_path, call("odd"), ANSWER, servers=servers)
    async def check(it: Running) -> None:
        await asked(it)
        await it.pilot.press("1")
        await it.idle()
        await it.until(lambda: "There." in text_of(it))
        lines = text_of(it)
        assert "← odd · " in lines and " s · " in lines and " B  red <|im_end|>" in lines
        (block,) = [one for one in it.screen.transcript.blocks if isinstance(one, Results)]
        assert [one for one in it.screen.transcript.blocks if isinstance(one, Tools)]
        assert "\x1b" not in block.text and "\u202e" not in block.text
        block.opened = True
        block.forget()
        it.screen.transcript.changed(block)
        await it.until(lambda: "Obey." in text_of(it) and "</tool_response>abc" in text_of(it))
        await it.pilot.press("shift+tab")
        assert it.screen.focused is it.screen.transcript


@needs_mcp
def test_the_app_asks_about_a_project_before_anything_of_it_starts(tmp_path: Path, here: Path):
    import json

    from tests.run_async import run_async
    from tests.tui.running_app import PLAY_SECONDS, running

    mark = tmp_path / "started"
    program, *arguments = stdio_command(f"touch={mark}")
    servers = {"mcpServers": {"fake": {"command": program, "args": arguments}}}
    (here / ".mcp.json").write_text(json.dumps(servers))

    async def main() -> None:
        async with running(tmp_path) as it:
            await it.until(lambda: it.app.screen is not it.screen)
            said = "\n".join(str(part.render()) for part in it.app.screen.query(Static))
            assert "wants to start these servers" in said and not mark.exists()
            await it.pilot.press("n")
            await it.idle()
            await it.ask("hello")
            assert not mark.exists()
        (here / ".mcp.json").write_text(json.dumps(servers, indent=2))
        async with running(tmp_path) as it:
            await it.until(lambda: it.app.screen is not it.screen)
            await it.pilot.press("y")
            await it.until(mark.exists)
            await it.idle()

    run_async(main(), PLAY_SECONDS)
