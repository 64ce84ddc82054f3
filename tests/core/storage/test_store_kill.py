"""What a killed process and several processes at once leave in a store.

`STORE_KILLS=30 pytest tests/core/storage/test_store_kill.py`
kills that often, at the real pace, about a minute.
"""

import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from qchat.core.storage.store import SAVE_PERIOD_SECONDS, Store
from tests.paths import ROOT

KILLS = int(os.environ.get("STORE_KILLS", "0"))
AT_ONCE = 5  # processes
MAX_LOST_SECONDS = 2.0
LETTERS = "abcdefgé"
# says what it has streamed and when, turn after turn
STREAMING = """
import sys, time
from qchat.core.storage.store import Store, StreamWriter
path, period, letters = sys.argv[1], float(sys.argv[2]), sys.argv[3]
store = Store(path)
conversation = store.create(title="streaming")
parent = None
for turn in range(10_000):
    parent = store.add_node(conversation, parent, "user", text=str(turn))
    parent = store.add_node(conversation, parent, "assistant", state="streaming")
    writer = StreamWriter(store, parent, period)
    text, ids = "", []
    for number in range(100 if turn % 3 else 1500):
        text += letters[number % len(letters)]
        ids.append(number)
        writer.update(text, text, ids)
        print(parent, len(text), time.monotonic(), flush=True)
        time.sleep(0.002)
    writer.finish(text=text, thinking=text, ids=ids)
    print(parent, 0, time.monotonic(), flush=True)  # 0: finished
"""
ADDING = """
import sys
from qchat.core.storage.store import Store
path, name = sys.argv[1:]
sys.stdin.readline()
with Store(path) as store:
    own = store.create(title=name)
for number in range(25):
    with Store(path) as store:
        store.add_node(1, None, "user", text=f"{name} {number}", ids=range(100))
        store.add_node(own, None, "user", text=f"word{number}")
        assert len(store.search(f"{name} {number}")) >= 1
        assert store.latest() is not None
"""


def start(script: str, *arguments: object, stdin: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={"PYTHONPATH": str(ROOT / ".dev"), "PATH": "", "PYTHONUTF8": "1"},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_all(running: list[subprocess.Popen[str]], seconds: list[float]) -> list[tuple[float, str]]:
    """Kill each after its time; when that was, and what it had said."""
    begun = time.monotonic()
    ends: dict[int, tuple[float, str]] = {}
    for wait, index in sorted(zip(seconds, range(len(running)), strict=True)):
        time.sleep(max(0.0, begun + wait - time.monotonic()))
        moment = time.monotonic()
        running[index].kill()
        said, complaint = running[index].communicate()
        assert complaint == ""
        ends[index] = moment, said
    return [ends[index] for index in range(len(running))]


def check_left_behind(path: Path, killed: float, said: str, max_lost_seconds: float) -> None:
    """The file is sound, finished turns are whole, and of the last one little is missing."""
    finished: set[int] = set()
    owed: dict[int, int] = {}  # characters that must be there
    for line in said.splitlines()[:-1]:  # the last one may be half a line
        node, length, moment = line.split()
        if length == "0":
            finished.add(int(node))
        if float(moment) <= killed - max_lost_seconds:
            owed[int(node)] = max(owed.get(int(node), 0), int(length))
    with Store(path) as store:
        nodes = {node.id: node for found in store.conversations() for node in store.nodes(found.id)}
    for id in finished:
        assert nodes[id].state == "complete"
        assert len(nodes[id].text) in (100, 1500)
    for id, length in owed.items():
        assert len(nodes[id].text) >= length, "more text is missing than may be"
    for node in nodes.values():
        if node.role == "assistant":
            whole = LETTERS * 200
            assert node.text == node.thinking == whole[: len(node.text)]
            assert node.ids == list(range(len(node.text)))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def kill_writers(folder: Path, periods: list[float], seconds: list[float], max_lost_seconds: float) -> None:
    paths = [folder / f"{number}.db" for number in range(len(periods))]
    running = [start(STREAMING, path, period, LETTERS) for path, period in zip(paths, periods, strict=True)]
    for path, (killed, said) in zip(paths, kill_all(running, seconds), strict=True):
        check_left_behind(path, killed, said, max_lost_seconds)


@pytest.mark.slow
def test_a_killed_writer_loses_little_and_damages_nothing(tmp_path: Path):
    """The pace is quicker than the real one, so that two seconds are enough to see that it is kept."""
    chance = random.Random()
    seconds = [chance.uniform(0.3, 3.0) for _ in range(AT_ONCE - 1)] + [3.0]
    kill_writers(tmp_path, [0.001, 0.01, 0.05, 0.2, 0.2], seconds, max_lost_seconds=1.0)


@pytest.mark.skipif(not KILLS, reason="STORE_KILLS is not set")
def test_thirty_killed_writers_lose_two_seconds_at_most(tmp_path: Path):
    chance = random.Random()
    for round in range(0, KILLS, AT_ONCE):
        seconds = [chance.uniform(0.3, 8.0) for _ in range(min(AT_ONCE, KILLS - round))]
        folder = tmp_path / str(round)
        kill_writers(folder, [SAVE_PERIOD_SECONDS] * len(seconds), seconds, MAX_LOST_SECONDS)


@pytest.mark.slow
def test_several_processes_on_one_store_lose_nothing_and_see_no_lock(tmp_path: Path):
    """They also race to make the file, and to make the search index."""
    path = tmp_path / "store.db"
    names = ["one", "two", "three"]
    running = [start(ADDING, path, name, stdin=subprocess.PIPE) for name in names]
    for process in running:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in running]
    assert said == [("", "")] * len(names)
    with Store(path) as store:
        assert {node.text for node in store.nodes(1)} == {
            f"{name} {number}" for name in names for number in range(25)
        } | {f"word{number}" for number in range(25)}
        for found in store.conversations():
            if found.id != 1:
                assert len(store.nodes(found.id)) == 25
