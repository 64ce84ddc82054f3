"""What a killed process leaves of a conversation that it was streaming.

`SESSION_KILLS=30 pytest tests/core/test_session_kill.py` kills that often, at random moments of replies.
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

from qchat.core import EMBEDDED_MODEL, Session, Store
from qchat.core.engine import Engine
from tests.compare import ROOT

KILLS = int(os.environ.get("SESSION_KILLS", "2"))
MAX_LOST_SECONDS = 2.0
QUESTIONS = ("What is the capital of France?", "Tell me a long story about a dog.", "Count to a hundred.")
# says how much of which reply it has shown, and when
TALKING = """
import sys, time
from qchat.core import Session, Store
from qchat.core.engine import Engine
from qchat.core.events import Done, Text, Thought
model, path, seed, *questions = sys.argv[1:]
session = Session(Engine.load(model), store=Store(path), max_new_tokens=300)
for turn in range(1000):
    shown = ""
    for event in session.stream(questions[turn % len(questions)], seed=int(seed) + turn):
        if isinstance(event, (Text, Thought)):
            shown += event.text
            print(turn, repr(shown), time.monotonic(), flush=True)
        if isinstance(event, Done):
            print(turn, repr(shown), 0.0, flush=True)  # 0: the reply was finished
"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(EMBEDDED_MODEL)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_conversation_lacks_two_seconds_of_its_last_reply_at_most(
    engine: Engine, tmp_path: Path, number: int
):
    path = tmp_path / "conversations.db"
    killed, lines = kill_talker(path, number)
    turns: dict[int, tuple[str, bool]] = {}  # what must be there: the text, and whether it is all
    for line in lines:
        turn, rest = line.split(" ", 1)
        text, moment = rest.rsplit(" ", 1)
        if float(moment) <= killed - MAX_LOST_SECONDS:
            turns[int(turn)] = (eval(text), float(moment) == 0.0)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with Store(path) as store:
        (conversation,) = store.conversations()
        session = Session.reopen(engine, store, conversation.id, max_new_tokens=5)
        kept = session.state()["turns"]
        for turn, (text, whole) in turns.items():
            said = kept[turn]["thinking"] + kept[turn]["answer"]
            assert said == text if whole else said.startswith(text)
        assert session.send("And now?").finish_reason in ("stop", "length")
        assert len(session.state()["turns"]) == len(kept) + 1


def kill_talker(path: Path, number: int) -> tuple[float, list[str]]:
    """Kill a process somewhere in its replies; when that was, and the whole lines that it said."""
    command = [sys.executable, "-c", TALKING, str(EMBEDDED_MODEL), str(path), str(1000 * number), *QUESTIONS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev"), "QCHAT_COMPILE": "off"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(random.Random(number).uniform(0.0, 5.0))
        killed = time.monotonic()
        process.kill()
        lines = [first, *process.stdout.read().split("\n")[:-1]]
    return killed, lines
