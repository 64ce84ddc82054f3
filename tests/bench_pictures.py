"""Seconds and memory that picture files take: hostile ones, odd ones, and the largest that are read.

`PYTHONPATH=.dev:. python tests/bench_pictures.py` opens each in a process of its own, as a message does, up
to the vision tower's patches. Exit code 1 if one takes more than SECONDS or NBYTES.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from qchat.core.errors import UsageError
from qchat.core.machine.backend import mx
from qchat.core.vision.picture import Picture
from qchat.core.vision.pixels import grid_of, patches
from qchat.core.vision.settings import PixelSettings

SECONDS, NBYTES = 5.0, 1_000_000_000
SETTINGS = PixelSettings(patch_size=16, temporal_patch_size=2, merge_size=2)
LARGEST = 7071  # pixels of a side: 50 million in all


def files() -> dict[str, bytes]:
    """All files by name."""
    from tests.core.vision.test_picture import HOSTILE, RIGHT, saved  # they would take the children's memory
    from tests.vision_checkpoints import noise

    flat = noise(70, 70).resize((LARGEST, LARGEST))
    long = noise(1, 10).resize((1, 10_000))
    return {
        **{name: make() for name, (make, *_) in RIGHT.items()},
        **{name: data for name, (data, _) in HOSTILE.items()},
        "1 x 10,000": saved(long, "PNG"),
        "50 million pixels, jpeg": saved(flat, "JPEG"),
        "50 million pixels, webp": saved(flat, "WEBP"),
    }


def look(data: bytes) -> str:
    """Prepare a picture as a message does; return its tokens or the sentence that refuses it."""
    picture = Picture(data)
    try:
        grid = grid_of(picture, SETTINGS)
        mx.eval(patches(picture, grid, SETTINGS))
    except UsageError as error:
        return str(error)
    return f"{grid.tokens:,} tokens"


def child() -> None:
    """Look at the file on stdin; print what it gave, seconds and peak memory."""
    data, began = sys.stdin.buffer.read(), time.perf_counter()
    outcome = look(data)
    print(json.dumps([outcome, time.perf_counter() - began, peak_nbytes()]))


def peak_nbytes() -> int:
    """Return the most memory that this process took; rusage would count its parent's on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    worst = 0.0, 0
    for name, data in files().items():
        run = subprocess.run([sys.executable, __file__, "child"], input=data, capture_output=True, check=True)
        outcome, seconds, peak = json.loads(run.stdout)
        worst = max(worst[0], seconds), max(worst[1], peak)
        print(f"{name:26}{seconds:6.2f} s {peak / 1e9:5.2f} GB  {outcome}", flush=True)
    print(f"at most {worst[0]:.2f} s of {SECONDS:.0f} and {worst[1] / 1e9:.2f} GB of {NBYTES / 1e9:.0f}")
    return int(worst[0] > SECONDS or worst[1] > NBYTES)


if __name__ == "__main__":
    sys.exit(child() if sys.argv[1:] else main())
