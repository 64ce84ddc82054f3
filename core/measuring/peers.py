"""The speed of other runtimes with the same model folder, by their own benchmarks."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import UsageError
from .results import PeerFigures

PEERS = ("mlx-lm",)
PROMPT_TOKENS, TOKENS = 512, 128
LIMIT_SECONDS = 1800
POLL_SECONDS = 0.5


def measure_peer(folder: Path, runs: int, poll: Callable[[], None] = lambda: None) -> PeerFigures:
    """Run mlx-lm's benchmark on `folder` in a process of its own; `poll` is called all the while.

    What `poll` raises ends the process. Raises UsageError where mlx-lm is not installed or fails.
    """
    command = [sys.executable, "-m", "mlx_lm", "benchmark", "--model", str(folder)]
    command += ["-p", str(PROMPT_TOKENS), "-g", str(TOKENS), "-n", str(runs)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output, errors = _wait(process, folder, poll)
        finally:
            process.kill()
    return _figures(folder, process.returncode, output, errors)


def _wait(process: "subprocess.Popen[str]", folder: Path, poll: Callable[[], None]) -> tuple[str, str]:
    """Return what the process wrote. Raises UsageError once it has run for too long."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        poll()
        try:
            return process.communicate(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise UsageError(f"mlx-lm did not end within {LIMIT_SECONDS:,} seconds on {folder}") from None


def _figures(folder: Path, code: int, output: str, errors: str) -> PeerFigures:
    averages = dict(re.findall(r"(\w+)=([\d.]+)", output.rpartition("Averages:")[2]))
    if code or not {"prompt_tps", "generation_tps"} <= averages.keys():
        last = (errors.strip() or "it wrote nothing").splitlines()[-1]
        raise UsageError(f"mlx-lm's benchmark failed on {folder}: {last}")
    return PeerFigures(
        prefill_tokens_per_s=float(averages["prompt_tps"]),
        decode_tokens_per_s=float(averages["generation_tps"]),
        peak_nbytes=int(float(averages.get("peak_memory", 0)) * 10**9),
    )
