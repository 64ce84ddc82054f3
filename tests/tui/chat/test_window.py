"""The window around the chat: what is written to it, when, and that it is given back."""

from dataclasses import replace
from pathlib import Path

import pytest

from qchat.core.events import Done
from qchat.tui.chat.turns import new_turn
from qchat.tui.chat.window import Window
from tests.tui.chat_stage import ChatStage, render
from tests.tui.running_app import ENDLESS, Running, chatting

GHOSTTY = {"TERM_PROGRAM": "ghostty"}
LONG = 11.0


class Written:
    """A window whose sequences are kept."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None):
        self.all: list[str] = []
        self.chat = ChatStage(folder).chat
        self.window = Window(self.all.append, GHOSTTY if env is None else env)

    def shown(self) -> list[str]:
        """What showing the chat as it is now writes."""
        self.all.clear()
        self.window.show(self.chat)
        return list(self.all)


def test_title_and_progress_follow_the_chat_and_are_written_when_they_change(tmp_path: Path):
    it = Written(tmp_path)
    it.chat.meter.end("idle")
    assert it.shown() == ["\x1b[22;0t", "\x1b]0;qchat\a"]
    it.chat.state = replace(it.chat.state, title="Merge\x1b sort")
    (written,) = it.shown()
    assert written == "\x1b]0;Merge sort · qchat\a"
    assert it.shown() == []
    status = it.chat.status
    status.phase, status.done, status.total = "reading", 30, 100
    assert it.shown()[-1] == "\x1b]9;4;1;30\a"
    status.phase = "answering"
    assert it.shown() == ["\x1b]9;4;3;0\a"]
    status.phase = "dead"
    assert it.shown()[-1] == "\x1b]9;4;2;0\a" and "✖" in it.all[0]
    status.phase = "idle"
    assert it.shown()[-1] == "\x1b]9;4;0;0\a"


def test_everything_is_given_back_once(tmp_path: Path):
    it = Written(tmp_path)
    it.chat.status.phase = "answering"
    it.shown()
    it.all.clear()
    for _ in range(2):
        it.window.close()
    assert it.all == ["\x1b]9;4;0;0\a", "\x1b]0;\a\x1b[23;0t"]
    it.window.show(it.chat)
    assert len(it.all) == 2, "nothing is written after the end"


def test_nothing_is_written_while_another_program_has_the_terminal(tmp_path: Path):
    it = Written(tmp_path)
    it.shown()
    it.window.pause()
    assert it.shown() == []
    it.window.notify(it.chat, "done", LONG)
    assert it.all == []
    it.window.resume()
    assert it.shown()[0] == "\x1b[22;0t"


def test_a_terminal_that_may_mistake_it_gets_no_progress(tmp_path: Path):
    it = Written(tmp_path, {"TERM": "xterm-256color"})
    it.chat.status.phase = "answering"
    assert not any("]9;4" in one for one in it.shown())
    it.all.clear()
    it.window.close()
    assert it.all == ["\x1b]0;\a\x1b[23;0t"]


def test_settings_switch_both_off(tmp_path: Path):
    it = Written(tmp_path)
    it.shown()
    it.chat.settings.change("window_title", False, "test")
    assert it.shown()[-1] == "\x1b]0;\a\x1b[23;0t"
    assert it.shown() == []
    it.window.notify(it.chat, "done", LONG)
    it.window.notify(it.chat, "too quick", 1.0)
    it.chat.settings.change("notify", False, "test")
    it.window.notify(it.chat, "not wanted", LONG)
    assert it.all == ["\x1b]9;qchat: done\a"]


@pytest.mark.slow
@pytest.mark.parametrize("focused", [True, False])
def test_the_end_of_a_long_reply_is_told_to_whoever_looks_elsewhere(tmp_path: Path, focused: bool):
    @chatting(tmp_path, ENDLESS)
    async def check(it: Running) -> None:
        written: list[str] = []
        it.screen.window._write = written.append
        await it.say("tell me")
        await it.until(lambda: it.phase == "answering")
        it.app.app_focus = focused  # after the last key, which comes to whoever has the focus
        it.chat.status.seconds = LONG
        it.front.finished(Done("stop"), new_turn(1, "tell me"))
        told = [one for one in written if one.startswith("\x1b]9;qchat")]
        assert told == ([] if focused else ["\x1b]9;qchat: the reply is there\a"])
        assert any(one.startswith("\x1b]0;") for one in written)
        await it.pilot.press("escape")
        await it.idle()


def test_the_end_of_a_long_job_is_told_too(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        written: list[str] = []
        it.screen.window._write = written.append
        it.app.app_focus = False
        job = it.chat.start_job("inspect fake", "inspect", {"model": "/models/fake"}, render)
        await job.ended()
        job.seconds = LONG
        it.front.job_changed(job)
        assert f"\x1b]9;qchat: {job.title}: done\a" in written
