"""The command in processes of its own: interrupts, broken pipes, real terminals, what start-up costs."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import indent
from typing import IO

import pytest

from qchat.tui import __version__
from tests.paths import ROOT

OPTIONS = """
help version prompt file system yes continue session json jsonl extract show-thinking stats quiet plain
screen-reader theme option think no-think effort thinking-budget max-tokens stop temperature top-p top-k min-p
repetition-penalty presence-penalty frequency-penalty seed history context-limit snapshot-budget kv-bits
image-tokens ranks hostfile schema persona yes-tools
"""

# the command with a session whose reply is STREAM, and which stops when asked to if HEEDED
COMMAND = """
import os, sys, time
import qchat.core
from qchat.core.events import Done, Prefill, Text
from qchat.tui.cli import choice
from qchat.tui.cli.main import main

choice.choose_model = lambda name, *_, **__: (name, None)
choice.is_path_or_model = lambda _: True

class Session:
    cancelled = False
    def stream(self, text):
STREAM
    def cancel(self):
        self.cancelled = HEEDED

vars(qchat.core)["load_session"] = lambda path, **settings: Session()
sys.exit(main())
"""
# says on stderr that it has begun, then talks without end
ENDLESS = r"""
os.write(2, b"ready")
yield Prefill(1, 1)
while not self.cancelled:
    yield Text("word ")
    time.sleep(0.01)
yield Done("cancelled", text="word ", generated_tokens=1)
"""
HOSTILE = r"""
yield Text("a\x1b[2Jb\x07")
yield Done("stop")
"""


def command(stream: str, *arguments: str, heeded: bool = True) -> list[str]:
    script = COMMAND.replace("STREAM", indent(stream, " " * 8)).replace("HEEDED", str(heeded))
    return [sys.executable, "-c", script, "model", "-p", "go", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / ".dev")}


def one_sentence(stderr: str) -> str:
    """The only line on stderr, which must be ours."""
    assert re.fullmatch(r"qchat: .*\n", stderr), stderr
    return stderr.removeprefix("qchat: ").rstrip("\n")


class Endless:
    """A process that runs `ENDLESS`, past its beginning."""

    def __init__(self, *arguments: str, heeded: bool = True, stdout: int | IO[bytes] = subprocess.PIPE):
        self.process = subprocess.Popen(
            command(ENDLESS, *arguments, heeded=heeded),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self.process.stderr is not None
        assert os.read(self.process.stderr.fileno(), 5) == b"ready"

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it still wrote to stdout and stderr."""
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, (out or b"").decode(), err.decode()


def test_an_interrupt_ends_the_reply_and_keeps_what_there_is():
    endless = Endless()
    time.sleep(0.1)
    endless.interrupt()
    code, out, err = endless.end()
    assert code == 130
    assert re.fullmatch(r"(word )+\n", out)
    assert err == ""


def test_an_interrupt_with_json_still_prints_the_object():
    endless = Endless("--json")
    endless.interrupt()
    code, out, _ = endless.end()
    assert code == 130
    assert json.loads(out)["finish_reason"] == "cancelled"


@pytest.mark.slow
def test_a_second_interrupt_ends_a_session_that_does_not_stop():
    endless = Endless(heeded=False)
    for _ in range(2):
        endless.interrupt()
        time.sleep(0.2)
    code, _, err = endless.end()
    assert (code, err) == (130, "")


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["--jsonl"]])
def test_a_closed_pipe_ends_silently(form: list[str]):
    endless = Endless(*form)
    assert endless.process.stdout is not None
    endless.process.stdout.close()
    endless.process.stdout = None
    assert endless.end() == (0, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence():
    with Path("/dev/full").open("wb") as full:
        code, _, err = Endless(stdout=full).end()
    assert code == 1
    assert "could not be written: No space left" in one_sentence(err)


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "out"), [("<&-", "True\n"), (">&-", ""), ("2>&-", "True\n")])
def test_a_stream_that_the_caller_closed_is_opened_on_nothing(closed: str, out: str):
    """MLX took a shard for missing that was opened under the free number 0, and a missing stderr crashed."""
    free = 'yield Text(str(os.dup(2) > 2))\nyield Done("stop")'
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command(free)]
    done = subprocess.run(shell, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, "")


def test_at_a_real_terminal_a_missing_model_is_one_sentence():
    leader, follower = pty.openpty()
    done = qchat("./model", stdin=follower, stdout=follower)
    os.close(follower)
    os.close(leader)
    assert done.returncode == 3
    assert "does not exist" in one_sentence(done.stderr)


def test_a_real_terminal_gets_the_answer_without_control_characters():
    leader, follower = pty.openpty()
    subprocess.run(command(HOSTILE), env=environment(), stdin=follower, stdout=follower, check=True)
    os.close(follower)
    assert os.read(leader, 100) == b"ab\r\n"
    os.close(leader)


def qchat(
    *arguments: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qchat.tui", *arguments],
        env=environment(),
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


def test_version_and_help_are_on_stdout():
    version, help_ = qchat("--version"), qchat("--help")
    assert (version.stdout, version.stderr, version.returncode) == (f"qchat {__version__}\n", "", 0)
    assert help_.stdout.startswith("usage: qchat")
    assert (help_.stderr, help_.returncode) == ("", 0)


def test_help_lists_every_option_and_no_other():
    options = re.findall(r"^  .*?(?=  |$)", qchat("--help").stdout, re.MULTILINE)
    flags = {flag for line in options for flag in re.findall(r"--[a-z-]+", line)}
    assert flags == {f"--{name}" for name in OPTIONS.split()}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy_and_cost_little(option: str):
    """The least CPU time of a few runs, so that a busy machine does not fail it."""
    script = (
        "import resource, sys\n"
        "from qchat.tui.cli.main import main\n"
        f"assert main([{option!r}]) == 0\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(usage.ru_utime + usage.ru_stime, *sys.modules, file=sys.stderr)"
    )

    def measure() -> tuple[float, set[str]]:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        seconds, *modules = done.stderr.split()
        return float(seconds), {name.partition(".")[0] for name in modules}

    runs = [measure() for _ in range(3)]
    heavy = {
        "mlx",
        "numpy",
        "textual",
        "rich",
        "prompt_toolkit",
        "tokenizers",
        "jinja2",
        "huggingface_hub",
        "json",
    }
    assert runs[0][1] & heavy == set()
    assert min(seconds for seconds, _ in runs) <= 0.12


def test_one_answer_imports_neither_terminals_nor_what_its_command_line_does_not_ask_for(tmp_path: Path):
    script = (
        "import sys\n"
        "from qchat.tui.cli.main import main\n"
        "assert main(['-p', 'Hi.', '--max-tokens', '1', '--no-think']) == 0\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(done.stderr.split())
    packages = {name.partition(".")[0] for name in imported}
    heavy = {"numpy", "textual", "rich", "prompt_toolkit", "asyncio", "llguidance"}
    assert packages & heavy == set()
    unasked = ("tools", "chat", "commands", "user.personas")
    assert [name for name in imported if name.startswith(tuple(f"qchat.tui.{one}" for one in unasked))] == []
