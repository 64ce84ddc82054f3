"""Mutated model folders, imports and protocol lines: each is accepted, or refused in a sentence, soon.

A share of the cases runs in every test run; `make fuzz` sets TESTS_FUZZ and runs 400 folders, 200 imports and
10,000 lines. `python tests/fuzz.py KIND GOOD SEED` repeats one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import quantize_checkpoint, write_checkpoint
from tests.paths import ROOT

SECONDS = 10.0
PEAK_NBYTES = 1_500_000_000
MAX_SENTENCES = 7000  # a case says up to three
WHOLE = bool(os.environ.get("TESTS_FUZZ"))
# kind -> cases in every run, cases of `make fuzz`, cases of one process
COUNTS = {"folder": (12, 400, 40), "import": (30, 200, 50), "line": (300, 10_000, 2500)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sound folders that are mutated."""
    root = tmp_path_factory.mktemp("good")
    write_checkpoint(root / "raw")
    write_checkpoint(root / "sharded", shards=2, tied=False)
    quantize_checkpoint(root / "raw", root / "packed", (4, 32, "affine"))
    write_checkpoint(root / "experts", moe=True, experts="each")
    return root


def run(kind: str, good: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """The outcome of each case, all in one process."""
    done = subprocess.run(
        [sys.executable, "tests/fuzz.py", kind, str(good), *map(str, seeds)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/.dev:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"after {done.stdout[-300:]}: {done.stderr[-2000:]}"
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", COUNTS)
def test_what_others_wrote_is_accepted_or_refused_in_a_sentence(kind: str, good: Path):
    few, many, at_once = COUNTS[kind]
    seeds = list(range(many if WHOLE else few))
    cases = [case for i in range(0, len(seeds), at_once) for case in run(kind, good, seeds[i : i + at_once])]
    assert len(cases) == len(seeds)
    refused = 0
    for case in cases:
        assert not case["fault"], f"{kind} {case['seed']}: {case['fault']}"
        assert case["said"].isprintable(), case
        assert len(case["said"]) < MAX_SENTENCES, case
        assert case["seconds"] < SECONDS, case
        assert case["peak"] < PEAK_NBYTES, case
        refused += bool(case["said"].strip(" |"))
    assert refused > len(cases) / 4  # mutations matter
