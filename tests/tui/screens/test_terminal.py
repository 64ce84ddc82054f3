"""The program in a real terminal, on the model in the package: sizes, keys, signals, its engine's death."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

PATIENCE_SECONDS = 60.0
STORY = "Write a long story about a cat."
needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
pytestmark = needs_tmux
_number = count()


class Terminal:
    """A window of tmux in which the program runs; what is left of it is ended with `close`."""

    def __init__(self, *words: str, size: tuple[int, int] = (100, 30), **environment: str):
        self._socket = f"qchat-test-{os.getpid()}-{next(_number)}"
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in ("TMUX", "TMUX_PANE")},
            "PYTHONPATH": str(ROOT / ".dev"),
        }
        own = [f"{name}={value}" for name, value in environment.items()]
        self.engines: set[int] = set()
        width, height = map(str, size)
        # the shell that comes after it tells how the program left the terminal
        script = '"$@"; echo "ENDED $?"; stty -a; exec sleep 600'
        program = ["env", *own, sys.executable, "-m", "qchat.tui", *words]
        shell = ["sh", "-c", script, "sh", *program]
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", width, "-y", height, *shell)

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-L", self._socket, *words]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def close(self) -> None:
        for pid in {*self.engines, *self.children(self.shell)}:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        socket = Path(self.told("socket_path"))
        self._tmux("kill-server")
        socket.unlink(missing_ok=True)

    def keys(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def say(self, text: str) -> None:
        """Type it, and press enter once it is there: what comes at once is taken for a paste."""
        self.type(text)
        self.until(lambda: text in self.screen)
        self.keys("Enter")

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def told(self, variable: str) -> str:
        return self._tmux("display-message", "-p", f"#{{{variable}}}").strip()

    @property
    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    @property
    def painted(self) -> str:
        """With its escape sequences."""
        return self._tmux("capture-pane", "-p", "-e")

    @property
    def shell(self) -> int:
        return int(self.told("pane_pid"))

    def children(self, pid: int) -> list[int]:
        done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
        return [int(word) for word in done.stdout.split()]

    @property
    def program(self) -> int:
        return self.children(self.shell)[0]

    def engine(self) -> int:
        """The process of the engine that runs now."""
        found = [pid for pid in self.children(self.program) if is_alive(pid)]
        assert len(found) == 1
        self.engines |= {*found}
        return found[0]

    def until(self, true: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not true():
            assert time.monotonic() < end, f"in vain:\n{self.screen}"
            time.sleep(0.05)

    def until_shown(self, *texts: str) -> None:
        self.until(lambda: all(text in self.screen for text in texts))

    def is_left_as_it_was(self, code: int) -> None:
        """The program has ended with `code`: its terminal is a shell's again and its engines are gone."""
        self.until(lambda: f"ENDED {code}" in self.screen and "iexten" in self.screen)
        words = self.screen.split()
        assert {"icanon", "echo", "isig", "iexten"} <= {word.rstrip(";") for word in words}
        flags = ("alternate_on", "mouse_any_flag", "cursor_flag")
        assert [self.told(flag) for flag in flags] == ["0", "0", "1"]
        self.until(lambda: not any(map(is_alive, self.engines)))


def is_alive(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


@pytest.fixture
def start() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def make(*words: str, **options: Any) -> Terminal:
        opened.append(Terminal(*words, **options))
        return opened[-1]

    yield make
    for terminal in opened:
        terminal.close()


@pytest.mark.slow
def test_a_chat_is_resized_loses_its_engine_goes_on_and_is_left(start: Callable[..., Terminal]):
    """One run for all, since each start costs seconds."""
    it = start("-o", "temperature=0")
    it.until_shown("○ ready", "enter send", "? keys")
    it.until(lambda: it.told("pane_title") == "embedded · qchat")
    it.say(STORY)
    it.until_shown("tok/s", "esc stop", "answer")
    assert it.told("pane_title").startswith("… ")
    for width, height in ((60, 16), (200, 60), (31, 9), (100, 30), (60, 16)):
        it.resize(width, height)
    it.until(lambda: it.screen.splitlines()[-1].strip() == "esc stop   ? keys")
    it.resize(200, 60)
    it.until(lambda: len(it.screen.splitlines()) == 60 and "ctrl+o thoughts" in it.screen.splitlines()[-1])
    it.resize(100, 30)
    it.until(lambda: "esc stop" in it.screen.splitlines()[-1] and it.screen.startswith(" embedded"))

    first = it.engine()
    os.kill(first, signal.SIGKILL)
    it.until_shown("engine stopped", "enter restarts")
    assert STORY in it.screen
    it.keys("Enter")
    it.until_shown("○ ready")
    assert STORY in it.screen
    assert it.engine() != first

    it.say(STORY)
    it.until(lambda: "answer" in it.screen.splitlines()[-3] and "esc stop" in it.screen.splitlines()[-1])
    it.keys("C-c")
    it.until_shown("■ stopped", "enter send")
    it.type("a draft")
    it.until_shown("❯ a draft")
    it.keys("C-c")
    it.until(lambda: "❯ a draft" not in it.screen)
    it.keys("C-c")
    it.until_shown("again quits")
    it.keys("C-c")
    it.is_left_as_it_was(0)
    assert "qchat -c goes on with this conversation" in it.screen
    assert "qchat" not in it.told("pane_title")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_as_its_user_would(
    start: Callable[..., Terminal], hermetic: Path, number: signal.Signals
):
    """While it answers and something is half typed; without colours, where those are not wanted."""
    it = start("-o", "temperature=0", **({"NO_COLOR": "1"} if number == signal.SIGTERM else {}))
    it.until_shown("○ ready")
    painted = re.search(r"\x1b\[[0-9;]*[34][0-8][0-9;]*m", it.painted)
    assert (painted is None) == (number == signal.SIGTERM), it.painted
    it.say(STORY)
    it.until_shown("esc stop")
    it.engine()
    it.type("half typed")
    it.until_shown("❯ half typed")
    os.kill(it.program, number)
    it.is_left_as_it_was(128 + number)
    assert "half typed" in (hermetic / "state/qchat/history").read_text()


@pytest.mark.slow
def test_a_terminal_that_can_do_nothing_gets_lines(start: Callable[..., Terminal]):
    it = start("--no-think", "-o", "temperature=0", TERM="dumb")
    it.until_shown("embedded")
    it.say("What is the capital of France?")
    it.until_shown("Paris")
    it.say("/bye")
    it.until_shown("ENDED 0")
    assert it.told("alternate_on") == "0"


@pytest.mark.slow
def test_back_from_the_shell_the_screen_is_painted_again(start: Callable[..., Terminal]):
    it = start()
    it.until_shown("○ ready")
    it.type("a draft")
    it.until_shown("❯ a draft")
    it.keys("C-z")
    it.until(lambda: it.told("alternate_on") == "0")
    os.kill(it.program, signal.SIGCONT)
    it.until_shown("○ ready", "❯ a draft", "enter send")
    it.keys("C-q")
    it.is_left_as_it_was(0)
