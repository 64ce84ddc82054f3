"""The line-based chat as its users meet it: in a pipe, in a pseudo-terminal, read aloud, interrupted."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.paths import ROOT

ENVIRONMENT = {"PYTHONPATH": f"{ROOT / '.dev'}:{ROOT}", "QCHAT_COMPILE": "off"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


def command(model: Path, *arguments: str) -> list[str]:
    short = ("--max-tokens", "4", "--no-think", "--temperature", "0")
    return [sys.executable, "-m", "qchat.tui", str(model), *short, *arguments]


def piped(model: Path, *lines: str, arguments: tuple[str, ...] = ("--plain",)) -> tuple[list[str], str]:
    """What the chat prints for these lines, and what it says beside it."""
    done = subprocess.run(
        command(model, *arguments),
        input="".join(f"{line}\n" for line in lines),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    return done.stdout.splitlines(), done.stderr


def own_terminal() -> None:
    """In the new process: its stdin is the terminal that controls it."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def in_terminal(model: Path, *arguments: str, **env: str):
    """The chat with `model` in a terminal of its own; yields the terminal and the process."""
    return running(command(model, *arguments), **env)


@contextmanager
def running(words: list[str], **env: str) -> Iterator[tuple[int, subprocess.Popen]]:
    ours, theirs = pty.openpty()
    environment = os.environ | ENVIRONMENT | {"TERM": "xterm-256color"} | env
    with subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        preexec_fn=own_terminal,
    ) as process:
        os.close(theirs)
        try:
            yield ours, process
        finally:
            process.kill()
    os.close(ours)


@pytest.mark.slow
def test_lines_from_a_pipe_are_answered_one_after_another_and_commands_done(model: Path):
    printed, said = piped(model, "hello", "/retry", "/frobnicate", "/undo", "/undo", "/bye")
    assert len(printed) >= 2
    assert printed[0] == printed[1]  # greedy: the second reply is the first
    assert "there is no command /frobnicate" in said
    assert "taken back: hello" in said
    assert "there is no question yet" in said


@pytest.mark.slow
def test_quotes_hold_several_lines_together(model: Path):
    printed, _ = piped(model, '"""', "first", "second", '"""', "/show prompt", "/bye")
    assert "first\nsecond" in "\n".join(printed)


@pytest.mark.slow
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("bad", [b"caf\xe9 au lait", b"\xff\xfe", b"cut \xf0\x9f\x98", b"\xed\xa0\x80"])
def test_a_line_that_is_not_utf_8_ends_a_pipe_in_a_sentence(model: Path, errors: str, bad: bytes):
    done = subprocess.run(
        command(model, "--plain"),
        input=b"hello\n" + bad + b"\nhello again\n",
        env=os.environ | ENVIRONMENT | {"PYTHONIOENCODING": f"utf-8:{errors}"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    said = done.stderr.decode()
    assert done.returncode == 2
    assert "line 2 of the input is not UTF-8: byte" in said and "Traceback" not in said
    assert done.stdout.strip(), "the line before it was answered"


@pytest.mark.slow
def test_the_cache_and_the_figures_are_told_in_words(model: Path):
    printed, _ = piped(model, "hello", "/cache", "/stats", "/help")
    told = "\n".join(printed)
    assert "how rebuild, reused 0" in told
    assert "generated 4" in told
    assert "/convert" in told and "/bye" in told


@pytest.mark.slow
def test_in_a_terminal_it_answers_and_leaves_with_ctrl_d(model: Path):
    with in_terminal(model, "--plain") as (terminal, process):
        screen = read_until(terminal, "ctrl+d leaves")
        os.write(terminal, b"hello\r")
        screen += read_until(terminal, "tok/s")
        os.write(terminal, b"\x04")
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_screen_reader_hears_who_speaks_and_no_drawing(model: Path):
    with in_terminal(model, "--screen-reader") as (terminal, process):
        screen = read_until(terminal, "You:")
        os.write(terminal, b"hello\r")
        screen += read_until(terminal, "Qwen:")
        screen += read_until(terminal, "You:")
        os.write(terminal, b"/bye\r")
        assert process.wait(20) == 0
    assert not re.search("[\u2500-\u25ff]", screen)


@pytest.mark.slow
def test_what_is_typed_during_a_reply_waits_for_its_end_unseen(model: Path):
    with in_terminal(model, "--plain", "--max-tokens", "200", NO_COLOR="1") as (terminal, process):
        read_until(terminal, "ctrl+d leaves")
        os.write(terminal, b"hello\r")
        read_until(terminal, "hello")
        os.write(terminal, b"/rename unseen\r/bye\r")
        screen = read_until(terminal, "is called")
        assert process.wait(20) == 0
    assert screen.index("\x1b[?2004h") < screen.index("/rename")  # at the next prompt, not within the reply
    assert "\x1b[3" not in screen  # no colour


@pytest.mark.slow
def test_a_new_line_an_interrupted_prompt_and_two_interrupts(model: Path):
    with in_terminal(model, "--plain") as (terminal, process):
        read_until(terminal, "ctrl+d leaves", "❯")
        os.write(terminal, b"one\ntwo\\\rthree\r")
        screen = read_until(terminal, "token limit")
        os.write(terminal, b"/show prompt\r")
        screen = read_until(terminal, "three<|im_end|>")
        assert "one\r\ntwo\r\nthree" in screen
        read_until(terminal, "❯")
        os.write(terminal, b"never sent")
        time.sleep(0.3)
        os.write(terminal, b"\x03")
        time.sleep(0.3)
        os.write(terminal, b"\x03")
        read_until(terminal, "ctrl+c again leaves")
        os.write(terminal, b"\x03")
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_dumb_terminal_gets_lines_alone(model: Path):
    with in_terminal(model, TERM="dumb") as (terminal, process):
        screen = read_until(terminal, "❯")
        os.write(terminal, b"hello\n")
        screen += read_until(terminal, "token limit")
        os.write(terminal, b"/bye\n")
        assert process.wait(20) == 0
    assert "\x1b" not in screen


@pytest.mark.slow
def test_an_interrupt_leaves_a_question_on_a_dumb_terminal(model: Path, tmp_path: Path):
    (tmp_path / "here.md").write_text("kept")
    with in_terminal(model, TERM="dumb") as (terminal, process):
        read_until(terminal, "❯")
        os.write(terminal, b"hello\n")
        read_until(terminal, "token limit")
        os.write(terminal, f"/export {tmp_path / 'here.md'}\n".encode())
        read_until(terminal, "[y/N]")
        os.write(terminal, b"\x03")
        read_until(terminal, "❯")
        os.write(terminal, b"/bye\n")
        assert process.wait(20) == 0
    assert (tmp_path / "here.md").read_text() == "kept"


def test_an_editor_that_cannot_start_is_a_sentence(model: Path):
    with in_terminal(model, "--plain", EDITOR="/nonexistent/editor", VISUAL="") as (terminal, process):
        read_until(terminal, "ctrl+d leaves", "❯")
        os.write(terminal, b"\x07")
        said = read_until(terminal, "/nonexistent/editor")
        if "❯" not in said.partition("/nonexistent/editor")[2]:
            said += read_until(terminal, "❯")
        assert "Traceback" not in said
        os.write(terminal, b"\x04")
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_terminated_chat_gives_the_terminal_back(model: Path):
    with in_terminal(model, "--plain") as (terminal, process):
        before = termios.tcgetattr(terminal)
        read_until(terminal, "ctrl+d leaves", "❯")
        process.terminate()
        assert process.wait(20) == 143
        assert termios.tcgetattr(terminal)[3] == before[3]


SCRIPTED = """
import asyncio
import sys
from pathlib import Path
from qchat.tui.chat.start import Beginning
from qchat.tui.chat.controller import Chat
from qchat.tui.user.history import History
from qchat.tui.plain.repl import run
from qchat.tui.user.settings import Settings
from tests.tui.fake_engine import FakeEngine

long = {"method": "send", "answer": "word " * 2000, "seconds": 0.01}
fake, settings = FakeEngine(Path(sys.argv[1]), long), Settings()
make = lambda view: Chat(view, fake.client, settings=settings)
with asyncio.Runner() as runner:
    begin = Beginning("/models/fake")
    sys.exit(run(make, settings=settings, history=History(), beginning=begin, runner=runner)[0])
"""


@pytest.mark.slow
def test_an_interrupt_stops_the_reply_and_not_the_chat(tmp_path: Path):
    with running([sys.executable, "-c", SCRIPTED, str(tmp_path)]) as (terminal, process):
        read_until(terminal, "ctrl+d leaves")
        os.write(terminal, b"hello\r")
        read_until(terminal, "word")
        os.write(terminal, b"\x03")
        read_until(terminal, "stopped")
        os.write(terminal, b"/bye\r")
        assert process.wait(20) == 0


def read_until(terminal: int, *marks: str, seconds: float = 30) -> str:
    """What appears on the terminal until one of `marks` does."""
    seen, end = "", time.monotonic() + seconds
    while not any(mark in seen for mark in marks):
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, f"none of {marks} appeared in {seen!r}"
        seen += os.read(terminal, 65536).decode(errors="replace")
        if "\x1b[6n" in seen:  # the terminal is asked where its cursor is
            os.write(terminal, b"\x1b[1;1R")
            seen = seen.replace("\x1b[6n", "")
    return seen


BOTH = """
import asyncio
import sys
from pathlib import Path
from qchat.tui.chat.start import Beginning
from qchat.tui.chat.controller import Chat
from qchat.tui.cli.launch import _converse, _Fronts
from qchat.tui.user.history import History
from qchat.tui.user.keymap import Keymap
from qchat.tui.user.settings import Settings
from tests.tui.fake_engine import FakeEngine

answers = [{"method": "send", "answer": f"answer number {n}"} for n in ("one", "two", "three")]
fake, settings = FakeEngine(Path(sys.argv[1]), *answers), Settings()
make = lambda view: Chat(view, fake.client, settings=settings)
with asyncio.Runner() as runner:
    fronts = _Fronts(settings, Keymap(), History(), runner)
    sys.exit(_converse(fronts, make, Beginning("/models/fake"), full=True))
"""


@pytest.mark.slow
def test_one_engine_goes_from_the_full_screen_to_the_lines_and_back(tmp_path: Path):
    with running([sys.executable, "-c", BOTH, str(tmp_path)]) as (terminal, process):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        read_until(terminal, "ready")
        os.write(terminal, b"first\r")
        read_until(terminal, "answer number one", "number one")
        os.write(terminal, b"/plain\r")
        read_until(terminal, "ctrl+d leaves")
        os.write(terminal, b"second\r")
        read_until(terminal, "answer number two")
        os.write(terminal, b"/plain off\r")
        read_until(terminal, "\x1b[?1049h")
        read_until(terminal, "number two")  # drawn again on the full screen
        os.write(terminal, b"third\r")
        read_until(terminal, "number three")
        os.write(terminal, b"/bye\r")
        assert process.wait(20) == 0
    requests = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    methods = [one["method"] for one in requests if one["method"] in ("load", "send", "open", "prime")]
    assert methods == ["load", "send", "send", "send"]


@pytest.mark.slow
def test_the_full_screen_is_refused_where_there_is_none(model: Path):
    printed, said = piped(model, "/plain off", "hello")
    assert "the full screen needs a terminal" in said and printed
