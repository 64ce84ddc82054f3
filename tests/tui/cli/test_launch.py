"""What is decided before a chat begins, and what is left on the terminal after it."""

import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qchat.core.conversation.summary import Turn
from qchat.core.errors import UsageError
from qchat.tui.chat.client import COMMAND, behind_launcher
from qchat.tui.chat.controller import Chat
from qchat.tui.chat.start import Beginning
from qchat.tui.chat.turns import NO_STATE, new_turn
from qchat.tui.chat.window import Window
from qchat.tui.cli import launch
from qchat.tui.user.history import History
from qchat.tui.user.keymap import Keymap
from qchat.tui.user.settings import Settings
from tests.tui.chat_stage import ChatStage
from tests.tui.fake_terminal import FakeTerminal

STREAMS = ("stdin", "stdout", "stderr")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in STREAMS:
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    return monkeypatch


def test_a_full_terminal_gets_the_full_screen(terminal: pytest.MonkeyPatch):
    del terminal
    assert launch.is_full(Settings())


@pytest.mark.parametrize("name", STREAMS)
def test_no_full_screen_where_a_stream_is_no_terminal(terminal: pytest.MonkeyPatch, name: str):
    terminal.setattr(getattr(sys, name), "isatty", lambda: False)
    assert not launch.is_full(Settings())


@pytest.mark.parametrize("term", ["dumb", "", None])
def test_no_full_screen_on_a_terminal_that_can_do_nothing(terminal: pytest.MonkeyPatch, term: str | None):
    if term is None:
        terminal.delenv("TERM")
    else:
        terminal.setenv("TERM", term)
    assert not launch.is_full(Settings())


@pytest.mark.parametrize("setting", ["plain", "screen_reader"])
def test_no_full_screen_where_it_is_not_wanted(terminal: pytest.MonkeyPatch, setting: str):
    del terminal
    assert not launch.is_full(Settings().replaced("test", **{setting: True}))


def left_behind(turns: tuple[Turn, ...], conversation: int | None, capsys: pytest.CaptureFixture) -> str:
    chat = SimpleNamespace(state=replace(NO_STATE, turns=turns, conversation=conversation))
    launch._say_farewell(cast(Chat, chat))
    return capsys.readouterr().out


def test_the_last_exchange_stays_on_the_terminal(capsys: pytest.CaptureFixture):
    answer = "\n".join(f"line {n}" for n in range(20))
    said = left_behind((replace(new_turn(1, "a\nlong one"), answer=answer),), 7, capsys).splitlines()
    assert said[:3] == ["❯ a long one", "", "… 8 lines before"]
    assert said[3:] == [*(f"line {n}" for n in range(8, 20)), "", "qchat -c goes on with this conversation"]


def test_what_is_not_stored_is_not_said_to_go_on(capsys: pytest.CaptureFixture):
    assert "qchat -c" not in left_behind((replace(new_turn(1, "a"), answer="b"),), None, capsys)


def test_what_stays_on_a_terminal_is_broken_between_words(monkeypatch: pytest.MonkeyPatch):
    terminal = FakeTerminal()
    monkeypatch.setattr(launch.sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "30")
    words = [f"word{number}" for number in range(30)]
    chat = SimpleNamespace(
        state=replace(NO_STATE, turns=(replace(new_turn(1, "a"), answer=" ".join(words)),))
    )
    launch._say_farewell(cast(Chat, chat))
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 30 and " ".join(lines[2:]).split() == words


def test_a_chat_without_a_word_leaves_nothing(capsys: pytest.CaptureFixture):
    assert left_behind((), None, capsys) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "cannot be read"),
        ("[]", "names no two hosts"),
        ('{"hosts": [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]}', "names no two hosts"),
        ('[{"ssh": "elsewhere"}, {"ssh": "127.0.0.1"}]', "the first host is 'elsewhere'"),
        (None, "there is no file"),
    ],
)
def test_a_hostfile_that_starts_nothing_here_is_refused(text: str | None, said: str, tmp_path: Path):
    file = tmp_path / "hosts.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=said):
        launch._engine(launch.Launch(Settings(), hostfile=str(file)))


def test_a_hostfile_or_a_number_of_ranks_starts_the_engine_through_the_launcher(tmp_path: Path):
    file = tmp_path / "hosts.json"
    file.write_text('[{"ssh": "127.0.0.1"}, {"ssh": "there"}]')
    by_file = launch.Launch(Settings(), hostfile=str(file))
    by_number = launch.Launch(Settings(), ranks=3)
    for given, words in ((by_file, ["--hostfile", str(file)]), (by_number, ["-n", "3"])):
        command, env = launch._engine(given)
        assert list(command[1:3]) == words
        assert list(command[-len(COMMAND) :]) == list(COMMAND)
        assert env == behind_launcher()
    assert launch._engine(launch.Launch(Settings())) == (COMMAND, {})
    with pytest.raises(UsageError, match="--ranks is 1, wanted 2 to"):
        launch._engine(launch.Launch(Settings(), ranks=1))


@pytest.mark.parametrize("fails", [False, True])
def test_the_window_is_given_back_however_the_app_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
):
    class ShownApp:
        failure, return_code = None, 0

        def __init__(self, *_: Any, **__: Any):
            self.chat = ChatStage(tmp_path).chat
            self.chat_screen = SimpleNamespace(window=Window(written.append, {"TERM_PROGRAM": "ghostty"}))

        def run(self, **_: Any) -> str:
            self.chat.status.phase = "answering"
            self.chat_screen.window.show(self.chat)
            if fails:
                raise RuntimeError("a crash")
            return "shell"

    written: list[str] = []
    terminal = FakeTerminal()
    monkeypatch.setattr(launch.sys, "stderr", terminal)
    monkeypatch.setattr("qchat.tui.screens.app.QchatApp", ShownApp)
    begin = Beginning("/models/fake")
    with pytest.raises(RuntimeError) if fails else nullcontext():
        launch._run_app(lambda _: ShownApp().chat, Settings(), Keymap(), History(), begin)
    assert written[-1] == "\x1b]9;4;3;0\a"
    assert terminal.getvalue().startswith("\x1b]9;4;0;0\a\x1b]0;\a\x1b[23;0t")


def test_a_chat_begins_where_nothing_can_be_saved_unless_a_stored_one_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with ExitStack() as stack:
        store, said = launch._opened(launch.Launch(Settings()), stack)
        assert store is None and said.startswith("conversations are not saved in this run: the folder")
        with pytest.raises(UsageError, match="cannot be made"):
            launch._opened(launch.Launch(Settings(), session="latest"), stack)
