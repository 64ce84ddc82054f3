"""The panes in the app: beside the conversation or below it, in every phase, size and setting."""

from pathlib import Path
from typing import Any

import pytest
from textual.geometry import Offset

from qchat.tui.user.settings import PANE_NAMES, Settings
from qchat.tui.widgets.panes.panes import PAINT_SECONDS, Panes
from tests.run_async import run_async
from tests.tui.running_app import ENDLESS, PLAY_SECONDS, Running, chatting, quick_keys, running

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")
WIDE, SHORT, NARROW, LEAST, TINY = (160, 45), (120, 20), (100, 30), (60, 16), (59, 16)
THINKING = {"method": "send", "thought": "Let me see. " * 40, "answer": "word " * 200, "seconds": 0.02}


def lines_of(panes: Panes) -> list[str]:
    return [panes.render_line(y).text for y in range(panes.size.height)] if panes.display else []


def panel_of(it: Running) -> str:
    return "\n".join(lines_of(it.screen.panes.panel))


def strip_of(it: Running) -> str:
    return "\n".join(lines_of(it.screen.panes.strip))


def shown(it: Running) -> tuple[bool, int]:
    """Whether there is a panel, and how many rows the strip has."""
    panes = it.screen.panes
    return panes.panel.display, panes.strip.size.height if panes.strip.display else 0


def test_a_wide_window_shows_every_pane_of_a_reply_on_its_way(tmp_path: Path):
    @chatting(tmp_path, THINKING, size=WIDE, thinking_budget=4096)
    async def check(it: Running) -> None:
        await it.say("one")
        await it.until(lambda: it.phase == "thinking" and "Let me see. Let me see." in panel_of(it))
        panel = panel_of(it)
        for name in PANE_NAMES:
            assert f"─ {name.capitalize()} ─" in panel
        assert "budget 4.1k" in panel
        await it.until(lambda: "first token" in panel_of(it) and "tok/s" in panel_of(it))
        await it.until(lambda: "weights" in panel_of(it) and "reused 10" in panel_of(it))
        assert len({len(line) for line in panel_of(it).split("\n")}) == 1
        assert it.screen.status_row.size.width == WIDE[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "place"),
    [
        (WIDE, (True, 0)),
        (SHORT, (True, 0)),
        (NARROW, (False, 2)),
        ((80, 24), (False, 1)),
        (LEAST, (False, 1)),
        (TINY, (False, 0)),
        ((160, 15), (False, 0)),
    ],
)
def test_the_window_decides_where_the_panes_stand(
    tmp_path: Path, size: tuple[int, int], place: tuple[bool, int]
):
    @chatting(tmp_path, size=size)
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.until(lambda: shown(it) == place)
        if place[0]:
            await it.until(lambda: "last reply" in panel_of(it) or "25.0 tok/s" in panel_of(it))
        elif place[1]:
            await it.until(lambda: "25.0 tok/s" in strip_of(it) and "Memory" in strip_of(it))


@pytest.mark.slow
def test_a_window_resized_through_all_sizes_while_a_reply_streams(tmp_path: Path):
    @chatting(tmp_path, ENDLESS, size=WIDE)
    async def check(it: Running) -> None:
        await it.say("one")
        for size in (NARROW, LEAST, TINY, (30, 8), LEAST, SHORT, (121, 16), NARROW, WIDE):
            await it.pilot.resize_terminal(*size)
            await it.until(lambda size=size: it.screen.size == size)
            before = it.chat.status.answer_tokens + it.chat.status.thought_tokens
            await it.until(
                lambda before=before: it.chat.status.answer_tokens + it.chat.status.thought_tokens > before
            )
            wide = size[0] >= 120 and size[1] >= 16
            due = (wide, not wide and size[0] >= 60 and size[1] >= 16)
            await it.until(lambda due=due: (shown(it)[0], shown(it)[1] > 0) == due)
            for panes in (it.screen.panes.panel, it.screen.panes.strip):
                assert all(len(line) == panes.size.width for line in lines_of(panes))
        assert it.phase in ("thinking", "answering")


@pytest.mark.slow
def test_nothing_is_drawn_while_nothing_moves_and_little_while_much_does(tmp_path: Path):
    @chatting(tmp_path, {**THINKING, "seconds": 0.005}, size=WIDE)
    async def check(it: Running) -> None:
        panel = it.screen.panes.panel
        await it.ask("one")
        await it.until(it.is_at_rest)
        await it.until(lambda: panel._timer is None)
        await it.pilot.pause()
        before = panel.painted
        for _ in range(50):
            await it.pilot.pause()
        assert panel.painted == before
        assert panel._timer is None

        now = [panel._drawn_at]
        drawn = [panel.painted]
        for _ in range(500):
            panel.moved()  # within a moment
        assert panel.painted <= drawn[0] + 1
        await it.until(lambda: panel._timer is None)
        assert panel.painted <= drawn[0] + 2
        assert panel._drawn_at - now[0] >= PAINT_SECONDS


def test_f5_hides_and_shows_the_panes_and_is_remembered(tmp_path: Path):
    @chatting(tmp_path, size=WIDE)
    async def check(it: Running) -> None:
        assert shown(it) == (True, 0)
        await it.pilot.press("f5")
        await it.until(lambda: shown(it) == (False, 0))
        assert "the panes are hidden" in it.keys
        assert Settings.load()["panes"] is False
        await it.pilot.press("f5")
        await it.until(lambda: shown(it) == (True, 0))
        assert Settings.load()["panes"] is True


def test_each_pane_is_shown_and_hidden_by_its_name_while_a_reply_streams(tmp_path: Path):
    @chatting(tmp_path, ENDLESS, size=WIDE)
    async def check(it: Running) -> None:
        await it.say("one")
        for name in PANE_NAMES:
            await it.say(f"/panes {name}")
            await it.until(lambda name=name: f"─ {name.capitalize()} ─" not in panel_of(it))
        assert shown(it) == (False, 0)
        await it.say("/panes memory")
        await it.until(lambda: "─ Memory ─" in panel_of(it))
        assert shown(it) == (True, 0)
        assert "─ Speed ─" not in panel_of(it)
        assert Settings.load()["shown_panes"] == ["memory"]


@pytest.mark.slow
def test_panes_that_the_settings_hide_stay_hidden(tmp_path: Path):
    async def main() -> None:
        async with running(tmp_path, size=WIDE, panes=False) as it:
            await it.idle()
            assert shown(it) == (False, 0)
        async with running(tmp_path, size=NARROW, shown_panes=["context", "memory"]) as it:
            await it.idle()
            await it.ask("one")
            await it.until(lambda: "Memory" in strip_of(it) and "Context" in strip_of(it))
            assert shown(it) == (False, 1)
            assert "Speed" not in strip_of(it)

    run_async(main(), PLAY_SECONDS)


async def branched(it: Running) -> None:
    """Ask two questions, and the second one differently."""
    await it.ask("one")
    await it.ask("two")
    await it.say("/edit 2 other")
    await it.until(lambda: len(it.chat.state.branches) == 2)
    await it.idle()
    await it.until(lambda: "└─" in panel_of(it))


@pytest.mark.slow
def test_enter_goes_to_the_branch_under_the_cursor(tmp_path: Path):
    @chatting(tmp_path, size=WIDE)
    async def check(it: Running) -> None:
        await branched(it)
        assert it.chat.state.turns[-1].question == "other"
        await it.pilot.press("shift+tab", "shift+tab")
        assert it.screen.focused is it.screen.panes.panel
        assert "enter go there" in it.keys
        await it.until(lambda: "› ★─◉ other" in panel_of(it))
        await it.pilot.press("down", "down")
        await it.until(lambda: "› └─● two" in panel_of(it))
        await it.pilot.press("enter")
        await it.until(lambda: it.chat.state.turns[-1].question == "two")
        await it.until(lambda: "★─◉ two" in panel_of(it))
        await it.pilot.press("escape")
        assert it.screen.focused is it.prompt
        await it.until(lambda: "›" not in panel_of(it))


def test_a_click_goes_to_a_branch_and_one_elsewhere_does_nothing(tmp_path: Path):
    @chatting(tmp_path, size=WIDE)
    async def check(it: Running) -> None:
        await branched(it)
        panel = it.screen.panes.panel
        await it.pilot.click(panel, offset=Offset(5, 2))
        await it.until(lambda: any("└─● two" in line for line in lines_of(panel)))
        row = next(y for y, line in enumerate(lines_of(panel)) if "└─● two" in line)
        await it.pilot.click(panel, offset=Offset(5, row))
        await it.until(lambda: it.chat.state.turns[-1].question == "two")
        assert len(it.engine.asked("switch")) == 1


@pytest.mark.slow
def test_a_branch_is_not_changed_while_a_reply_streams(tmp_path: Path):
    @chatting(tmp_path, {"method": "send"}, {"method": "send"}, ENDLESS, size=WIDE)
    async def check(it: Running) -> None:
        await branched(it)
        await it.say("more")
        await it.until(lambda: it.phase == "answering")
        await it.pilot.press("shift+tab", "shift+tab", "down", "enter")
        await it.until(lambda: any(kind == "error" for kind, _ in it.said))
        assert not it.engine.asked("switch")


def test_letters_go_on_to_the_prompt_and_one_branch_needs_no_cursor(tmp_path: Path):
    @chatting(tmp_path, size=WIDE)
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.pilot.press("shift+tab", "shift+tab")
        assert it.screen.focused is it.prompt
        await it.say("/edit 1 other")
        await it.until(lambda: len(it.chat.state.branches) == 2)
        await it.idle()
        await it.pilot.press("shift+tab", "shift+tab", "x")
        await it.until(lambda: it.screen.focused is it.prompt and it.prompt.text == "x")


def test_a_window_that_hides_the_panel_takes_the_focus_back_to_the_prompt(tmp_path: Path):
    @chatting(tmp_path, size=WIDE)
    async def check(it: Running) -> None:
        await branched(it)
        await it.pilot.press("shift+tab", "shift+tab")
        await it.pilot.resize_terminal(*NARROW)
        await it.until(lambda: it.screen.focused is it.prompt)
        await it.pilot.press(*"hi")
        assert it.prompt.text == "hi"


def test_hiding_the_panes_takes_the_focus_back_to_the_prompt(tmp_path: Path):
    @chatting(tmp_path, size=WIDE)
    async def check(it: Running) -> None:
        await branched(it)
        await it.pilot.press("shift+tab", "shift+tab", "f5")
        await it.until(lambda: it.screen.focused is it.prompt)


def test_another_conversation_has_none_of_the_figures_of_the_last_one(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "thought": "A secret plan.", "answer": "Yes. " * 20}, size=WIDE)
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.until(lambda: "A secret plan." in panel_of(it) and "new 2" in panel_of(it))
        await it.say("/new")
        await it.until(lambda: not it.chat.state.turns)
        await it.idle()
        await it.until(lambda: "empty: the first question begins it" in panel_of(it))
        assert "A secret plan." not in panel_of(it)
        assert "the first reply is measured here" in panel_of(it)


def test_without_a_model_the_panes_say_what_to_do(tmp_path: Path):
    async def main() -> None:
        failing: dict[str, Any] = {
            "method": "load",
            "error": {"kind": "ModelError", "message": "no such folder", "exit_code": 3},
        }
        async with running(tmp_path, failing, size=WIDE) as it:
            await it.until(lambda: it.said)
            await it.until(lambda: "no model: f2 or /load chooses one" in panel_of(it))

    run_async(main(), PLAY_SECONDS)


def test_what_the_model_thinks_cannot_command_the_terminal(tmp_path: Path):
    nasty = {"method": "send", "thought": "a\x1b[2Jb\x07c\u202ed", "answer": "Yes."}

    @chatting(tmp_path, nasty, size=WIDE)
    async def check(it: Running) -> None:
        await it.ask("one\x1b[31m")
        await it.until(lambda: "first token" in panel_of(it))
        assert not {"\x1b", "\x07", "\u202e"} & set(panel_of(it))


def test_the_engine_is_asked_only_for_panes_that_are_shown(tmp_path: Path):
    @chatting(tmp_path, size=NARROW)
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.until(it.is_at_rest)
        assert not it.engine.asked("explain")
        assert not it.engine.asked("memory")
        await it.pilot.resize_terminal(*WIDE)
        await it.until(lambda: it.engine.asked("explain") and it.engine.asked("memory"))
        await it.until(lambda: "snapshots 1 MB" in panel_of(it))


def test_a_dead_engine_leaves_the_panes_standing(tmp_path: Path):
    @chatting(tmp_path, {**ENDLESS, "answer": "a b c", "die": "SIGKILL"}, size=WIDE)
    async def check(it: Running) -> None:
        await it.say("one")
        await it.until(lambda: it.phase == "dead")
        await it.until(lambda: "─ Speed ─" in panel_of(it))
