"""A conversion killed at random moments: the destination is absent or complete, and a rerun finishes it."""

import hashlib
import random
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.killed_process import kill_at, start

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


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.name not in ("README.md", "conversion.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_ten_kills_leave_the_destination_absent_or_complete(tmp_path: Path):
    raw, new, straight = (tmp_path / name for name in ("raw", "new", "straight"))
    write_checkpoint(raw, tied=False)
    source = digests(raw)
    output, _ = start(SCRIPT, raw, straight).communicate()
    lines = len(output.splitlines())
    choose = random.Random(0)
    for _ in range(KILLS):
        kill_at(start(SCRIPT, raw, new), choose.randrange(lines))
        if new.exists():
            assert digests(new) == digests(straight)
            shutil.rmtree(new)
    final = start(SCRIPT, raw, new)
    final.communicate()
    assert final.returncode == 0
    assert digests(new) == digests(straight)
    assert digests(raw) == source
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "raw", "straight"]
