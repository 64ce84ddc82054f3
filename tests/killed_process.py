"""A Python program in a process of its own, and its death in the middle."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT


def start(script: str, *words: Path) -> "subprocess.Popen[str]":
    """Run the program `script` with these arguments."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev")}
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def kill_at(process: "subprocess.Popen[str]", line: int) -> None:
    """SIGKILL once `line` lines of progress have come, or let it end if there are fewer."""
    assert process.stdout is not None
    for number, _ in enumerate(process.stdout):
        if number >= line:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()
