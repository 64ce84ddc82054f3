"""What a killed process leaves of a conversation that it was streaming, and two that talk in the same one.

`SESSION_KILLS=30 pytest tests/core/conversation/test_session_kill.py`
kills that often, at random moments of replies.
"""

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from qchat.core import BUILT_IN_MODEL, Session, Store
from qchat.core.conversation.summary import describe_session
from qchat.core.conversation.transcript import Input
from qchat.core.engine.engine import Engine
from tests.paths import ROOT

KILLS = int(os.environ.get("SESSION_KILLS", "2"))
MAX_LOST_SECONDS = 2.0
QUESTIONS = ("What is the capital of France?", "Tell me a long story about a dog.", "Count to a hundred.")
# says how much of which reply it has shown, and when
TALKING = """
import json, sys, time
from qchat.core import Session, Store
from qchat.core.engine.engine import Engine
from qchat.core.events import Done, Text, Thought
model, path, seed, *questions = sys.argv[1:]
session = Session(Engine.load(model), store=Store(path), max_new_tokens=300)
for turn in range(1000):
    shown = ""
    for event in session.stream(questions[turn % len(questions)], seed=int(seed) + turn):
        if isinstance(event, (Text, Thought)):
            shown += event.text
            print(json.dumps([turn, shown, time.monotonic()]), flush=True)
        if isinstance(event, Done):
            print(json.dumps([turn, shown, 0.0]), flush=True)  # 0: the reply was finished
"""
# two of these at once, each two turns in the same conversation
JOINING = """
import sys
from qchat.core import Session, Store
from qchat.core.engine.engine import Engine
from qchat.core.events import Notice
model, path, name = sys.argv[1:]
engine = Engine.load(model)
store = Store(path)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(2):
    session = Session.reopen(engine, store, 1, max_new_tokens=8)
    for event in session.stream(f"{name} {turn}"):
        if isinstance(event, Notice):
            print(event.text)
    session.close()
"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(BUILT_IN_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_conversation_lacks_two_seconds_of_its_last_reply_at_most(
    engine: Engine, tmp_path: Path, number: int
):
    path = tmp_path / "conversations.db"
    killed, lines = kill_talker(path, number)
    turns: dict[int, tuple[str, bool]] = {}  # what must be there: the text, and whether it is all
    for line in lines:
        turn, text, moment = json.loads(line)
        if moment <= killed - MAX_LOST_SECONDS:
            turns[turn] = text, moment == 0.0
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with Store(path) as store:
        (conversation,) = store.conversations()
        session = Session.reopen(engine, store, conversation.id, max_new_tokens=5)
        kept = describe_session(session).turns
        for turn, (text, whole) in turns.items():
            said = kept[turn].thinking + kept[turn].answer
            assert said == text if whole else said.startswith(text)
        assert session.send("And now?").finish_reason in ("stop", "length")
        assert len(describe_session(session).turns) == len(kept) + 1


@pytest.mark.slow
def test_two_processes_in_one_conversation_lose_nothing_and_see_no_lock(engine: Engine, tmp_path: Path):
    path = tmp_path / "conversations.db"
    with Store(path) as store:
        Session(engine, store=store, max_new_tokens=8).send("first")
        names = ("one", "two")
        running = [start(JOINING, path, name, stdin=subprocess.PIPE) for name in names]
        for process in running:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        assert [process.communicate("go\n", timeout=120)[0] for process in running] == ["", ""]
        session = Session.reopen(engine, store, 1)
        asked = [node.text for node in session.tree.nodes if isinstance(node, Input)]
        assert sorted(asked) == sorted(["first", *(f"{name} {n}" for name in names for n in range(2))])
        assert [node.state for node in store.nodes(1)] == ["complete"] * 10


def start(script: str, *arguments: object, stdin: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(BUILT_IN_MODEL), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".dev"), "QCHAT_COMPILE": "off"},
        stdin=stdin,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_talker(path: Path, number: int) -> tuple[float, list[str]]:
    """Kill a process somewhere in its replies; when that was, and the whole lines that it said."""
    with start(TALKING, path, 1000 * number, *QUESTIONS) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(random.Random(number).uniform(0.0, 5.0))
        killed = time.monotonic()
        process.kill()
        lines = [first, *process.stdout.read().split("\n")[:-1]]
    return killed, lines
