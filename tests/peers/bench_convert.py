"""Races `qchat convert` against `mlx_lm.convert` on one folder, 4 bits in groups of 64, a process each.

`python tests/peers/bench_convert.py [FOLDER]`; without one, a synthetic 8 GB checkpoint is made and removed.
The folder is read once first, so that neither pays for a cold disk. qchat's run contains its checks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 10**6
READ_NBYTES = 1 << 24
QUANTIZE = ["-q", "--q-bits", "4", "--q-group-size", "64"]


@dataclass
class ProcessRun:
    """One process: seconds from start to end, its largest resident set in bytes, what it printed."""

    seconds: float
    peak_nbytes: int
    output: str


def run(command: list[str], log: Path) -> ProcessRun:
    """Raises SystemExit with the end of its output where the command fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / ".dev"), str(ROOT)])}
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return ProcessRun(seconds, usage.ru_maxrss * unit, log.read_text())


def warm(folder: Path) -> int:
    """Read every weight file; returns their bytes."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(READ_NBYTES):
                pass
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def race(source: Path, work: Path) -> None:
    nbytes = warm(source)
    places = ["-i", str(source), "-o", str(work / "qchat")]
    ours = run([sys.executable, "-m", "qchat.tui", "convert", *places, *QUANTIZE[:3], "--json"], work / "log")
    report = json.loads(ours.output[ours.output.index("{") :])
    places = ["--hf-path", str(source), "--mlx-path", str(work / "mlx-lm")]
    theirs = run([sys.executable, "-m", "mlx_lm", "convert", *places, *QUANTIZE], work / "log")
    print(f"{source}: {nbytes / 10**9:.2f} GB, {len(os.sched_getaffinity(0))} cores")
    print(f"{'':<24}{'seconds':>10}{'MB/s':>10}{'peak RSS, MB':>15}")
    show("qchat, checks included", ours.seconds, nbytes, ours.peak_nbytes)
    show("qchat, writing alone", report["seconds"], nbytes, ours.peak_nbytes)
    show("mlx_lm.convert", theirs.seconds, nbytes, theirs.peak_nbytes)


def show(name: str, seconds: float, nbytes: int, peak_nbytes: int) -> None:
    speed = nbytes / MEGABYTE / seconds
    print(f"{name:<24}{seconds:>10.1f}{speed:>10.0f}{peak_nbytes / MEGABYTE:>15.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a raw checkpoint")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory(prefix="qchat-bench-") as place:
        work = Path(place)
        if folder is None:
            folder = work / "big"
            run([sys.executable, "-m", "tests.big_checkpoint", str(folder)], work / "log")
        race(folder, work)


if __name__ == "__main__":
    main()
