"""A conversion killed at random moments: the destination is absent or complete, and a rerun finishes it."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.paths import ROOT

KILLS = 10
SCRIPT = """
import sys
from pathlib import Path
from qchat.core.conversion import convert

convert.SHARD_NBYTES = 60_000
source, target = map(Path, sys.argv[1:])
conversion = convert.Conversion(source, target, convert.Options(recipe="none", bits=4))
print("begun", flush=True)
convert.convert(conversion, lambda event: print(event, flush=True))
print("published", flush=True)
"""


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(source), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def kill_at(process: subprocess.Popen[str], line: int) -> None:
    """SIGKILL once `line` lines of progress have come, or let it end if there are fewer."""
    assert process.stdout is not None
    for number, _ in enumerate(process.stdout):
        if number >= line:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.name not in ("README.md", "conversion.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_ten_kills_leave_the_destination_absent_or_complete(tmp_path: Path):
    raw, new, straight = (tmp_path / name for name in ("raw", "new", "straight"))
    write_checkpoint(raw, tied=False)
    source = digests(raw)
    output, _ = start(raw, straight).communicate()
    lines = len(output.splitlines())
    choose = random.Random(0)
    for _ in range(KILLS):
        kill_at(start(raw, new), choose.randrange(lines))
        if new.exists():
            assert digests(new) == digests(straight)
            shutil.rmtree(new)
    final = start(raw, new)
    final.communicate()
    assert final.returncode == 0
    assert digests(new) == digests(straight)
    assert digests(raw) == source
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "raw", "straight"]
