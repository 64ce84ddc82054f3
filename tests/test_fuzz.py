"""Mutated folders, templates, imports and protocol lines: each is accepted, or refused in a sentence, soon.

A share of the cases runs in every test run; `make fuzz` sets TESTS_FUZZ and runs 400 folders, 200 templates,
200 imports, and 10,000 lines each to the parser and to a live engine. `python tests/fuzz.py KIND GOOD SEED`
repeats one.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import quantize_checkpoint, write_checkpoint
from tests.core.worker.driver import Driver
from tests.fuzz import live_line, sound_values
from tests.paths import ROOT

SECONDS = 10.0
PEAK_NBYTES = 1_500_000_000
MAX_SENTENCES = 7000  # a case says up to three
WHOLE = bool(os.environ.get("TESTS_FUZZ"))
# kind -> cases in every run, cases of `make fuzz`, cases of one process
COUNTS = {
    "folder": (12, 400, 40),
    "template": (12, 200, 50),
    "import": (30, 200, 50),
    "line": (300, 10_000, 2500),
}
LOADED = ("model", "store", "defaults", "context_limit")
LIVE_LINES = 10_000 if WHOLE else 200


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


@pytest.mark.slow
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


# --- a live engine process ---


def peak_nbytes(pid: int) -> int:
    """The peak memory of a process; 0 where the system does not tell that of others."""
    path = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+)", path.read_text()) if path.exists() else None
    return 1024 * int(found[1]) if found else 0


def follow(engine: Driver, draw: random.Random, good: Path, work: Path) -> tuple[int, float]:
    """Send one line, then a sound request; return the number of errors and the seconds until its end."""
    begin, errors = time.monotonic(), 0
    line = live_line(draw, good, work)
    engine.write(line + b"\n")
    number = engine.ask("state")
    while (message := engine.read()) is not None:
        sentence = message.get("error", {}).get("message", "")
        assert sentence.isprintable() and "internal error" not in sentence, (line[:300], sentence)
        errors += "error" in message
        if message.get("id") == number:
            return errors, time.monotonic() - begin
    raise AssertionError(f"the process ended after {line[:300]!r}")


@pytest.mark.slow
def test_a_live_engine_answers_any_line_and_goes_on(good: Path, tmp_path: Path):
    draw, errors = random.Random("live"), 0
    settings = {"temperature": 0.0, "max_new_tokens": 3}
    with (tmp_path / "log").open("wb") as log, Driver(cwd=tmp_path, stderr=log) as engine:
        engine.do("load", **{name: sound_values(good, tmp_path)[name] for name in LOADED})
        for count in range(LIVE_LINES):
            found, seconds = follow(engine, draw, good, tmp_path)
            errors += found
            assert seconds < SECONDS, count
        assert "state" in engine.do("load", model=str(good / "raw"))
        assert engine.do("send", text="hello", settings=settings)["state"]
        assert peak_nbytes(engine.process.pid) < PEAK_NBYTES
        assert engine.do("shutdown") == {}
        assert engine.wait(20) == 0
    assert not (tmp_path / "log").read_bytes()
    assert errors > LIVE_LINES / 4
