"""The first minute: seconds until a new installation answers, and until it answers again.

`python tests/bench_start.py [MODEL]`; exit code 1 where a budget is broken. "Fresh" rows run in an empty home
with empty caches. Times are wall clock, medians; CPU seconds are those of qchat and its children.
"""

import argparse
import fcntl
import os
import pty
import resource
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
QTINY = ROOT.parent / "shared/models/qtiny-24m"
ROUNDS = 3
QUESTION = ("-p", "Name three rivers.", "--max-tokens", "16", "--no-think", "--temperature", "0")
SCREEN = struct.pack("HHHH", 30, 100, 0, 0)
PAINTED_NBYTES = 2000  # entering the full screen takes a tenth of it
LIMIT_SECONDS = 120
FRESH_BUDGET, WARM_BUDGET = 2.5, 1.0


class Times(NamedTuple):
    """Seconds to the first output, to the end, and of processor time."""

    first: float
    whole: float
    cpu: float


class Place:
    """A home and how to run qchat in it; caches live and die with `folder`."""

    def __init__(self, folder: Path, python: str = sys.executable, path: str | None = None):
        (folder / "tmp").mkdir(exist_ok=True)
        self.python = python
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("QCHAT_", "XDG_"))}
        self.environment = kept | {
            "HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": os.pathsep.join([str(ROOT / ".dev"), *(one for one in sys.path[1:] if one)]),
            "TERM": "xterm-256color",
            "HF_HUB_OFFLINE": "1",
            "PATH": os.environ["PATH"] if path is None else path,
        }


def run(place: Place, arguments: Sequence[str]) -> Times:
    """Run Python with `arguments`; its first output on stdout is what counts."""
    before, began = cpu_seconds(), time.perf_counter()
    process = subprocess.Popen(
        [place.python, "-P", *arguments],
        env=place.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.read(1)
    seconds = time.perf_counter() - began
    process.stdout.read()
    said = process.stderr.read().decode()
    if process.wait(LIMIT_SECONDS):
        sys.exit(f"qchat failed: {said}")
    return Times(seconds, time.perf_counter() - began, cpu_seconds() - before)


def cpu_seconds() -> float:
    """Of this process's children that have ended; what they left running is not among them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def answer(place: Place, model: Path) -> Times:
    return run(place, ["-m", "qchat.tui", str(model), *QUESTION])


def first_paint(place: Place, model: Path) -> Times:
    """Start the app at a terminal, and end it when it has painted its screen."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, SCREEN)
    before, began = cpu_seconds(), time.perf_counter()
    process = subprocess.Popen(
        [place.python, "-P", "-m", "qchat.tui", str(model)],
        env=place.environment,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    painted = 0
    with suppress(OSError):  # the app has ended
        while painted < PAINTED_NBYTES and select.select([leader], [], [], LIMIT_SECONDS)[0]:
            painted += len(os.read(leader, 1 << 16))
    seconds = time.perf_counter() - began
    process.send_signal(signal.SIGTERM)
    os.close(leader)
    process.wait(LIMIT_SECONDS)
    if painted < PAINTED_NBYTES:
        sys.exit("the app ended before it had painted anything")
    return Times(seconds, seconds, cpu_seconds() - before)


def imports(module: str) -> Callable[[Place, Path], Times]:
    return lambda place, _: run(place, ["-c", f"import {module}; print(1)"])


def without_patchelf(folder: Path) -> str:
    """A Python that has no program beside it."""
    alone = folder / "bin" / "python"
    alone.parent.mkdir()
    alone.symlink_to(Path(sys.executable).resolve())
    return str(alone)


def path_without(*programs: str) -> str:
    """PATH without the folders that hold one of these."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(
        one for one in folders if not any((Path(one) / name).exists() for name in programs)
    )


def fresh(measure: Callable[[Place, Path], Times], model: Path, lacking: str = "") -> Times:
    """One measurement in a new home, on a machine without the program `lacking`."""
    folder = Path(tempfile.mkdtemp(prefix="qchat-start-"))
    try:
        python = without_patchelf(folder) if lacking == "patchelf" else sys.executable
        path = path_without(lacking) if lacking else None
        return measure(Place(folder, python, path), model)
    finally:
        end_processes_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def end_processes_of(home: Path) -> None:
    """End what compiles kernels in this home, which would take the processor from the next measurement."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"HOME={home}\0".encode() in environ.read_bytes():
                os.kill(int(environ.parent.name), signal.SIGKILL)


def median(times: list[Times]) -> Times:
    return Times(*map(statistics.median, zip(*times, strict=True)))


def row(label: str, times: list[Times], budget: float | None = None) -> bool:
    """Print one line; returns whether the budget holds."""
    middle = median(times)
    kept = budget is None or middle.first <= budget
    note = "" if budget is None else f"   at most {budget:.1f} s{'' if kept else ': BROKEN'}"
    print(f"{label:48}{middle.first:8.2f}{middle.whole:8.2f}{middle.cpu:8.2f}{note}", flush=True)
    return kept


def measure_all(model: Path, rounds: int) -> bool:
    repeat = range(rounds)
    print(f"{'seconds':48}{'first':>8}{'whole':>8}{'cpu':>8}")
    kept = [
        row("answer, fresh home", [fresh(answer, model) for _ in repeat], FRESH_BUDGET),
        row("answer, fresh home, no g++", [fresh(answer, model, "g++") for _ in repeat], FRESH_BUDGET),
        row(
            "answer, fresh home, no patchelf",
            [fresh(answer, model, "patchelf") for _ in repeat],
            FRESH_BUDGET,
        ),
        row("app's first paint, fresh home", [fresh(first_paint, model) for _ in repeat], FRESH_BUDGET),
    ]
    with tempfile.TemporaryDirectory(prefix="qchat-start-", ignore_cleanup_errors=True) as folder:
        place = Place(Path(folder))
        answer(place, model)
        run(place, ["-m", "qchat.core.engine.precompile", "--wait", str(model)])
        kept += [
            row("answer, warm", [answer(place, model) for _ in repeat], WARM_BUDGET),
            row("app's first paint, warm", [first_paint(place, model) for _ in repeat], WARM_BUDGET),
        ]
        for module in ("qchat.core.engine.engine", "qchat.tui.cli.oneshot", "qchat.tui.screens.chat"):
            row(f"import {module}", [imports(module)(place, model) for _ in repeat])
    return all(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure qchat's start, fresh and warm.")
    parser.add_argument("model", type=Path, nargs="?", default=QTINY, help=f"model folder (default {QTINY})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each row (default {ROUNDS})")
    args = parser.parse_args()
    print(f"{args.model.name}; load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return 0 if measure_all(args.model, args.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
