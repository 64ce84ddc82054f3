"""An engine process's methods without the process: loads that fail, stores that change, failing idle work."""

import os
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qchat.core.conversation.session import Session
from qchat.core.errors import QchatError
from qchat.core.generation.decode import FIRST_TIMED_CHUNK, TimedChunks
from qchat.core.storage.store import Store
from qchat.core.worker.channel import Inbox
from qchat.core.worker.methods import READING_AHEAD, EngineMethods
from qchat.core.worker.process import Worker
from qchat.core.worker.protocol import METHODS
from tests.checkpoints import write_checkpoint
from tests.fake_clock import FakeClock

ANSWER = {"role": "assistant", "content": "yes"}
BRIEF = {"temperature": 0.0, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder)
    return str(folder)


@pytest.fixture
def methods() -> Iterator[EngineMethods]:
    methods = EngineMethods(lambda _: None, lambda: False)
    yield methods
    methods.close()


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of stores that were closed, in order."""
    names: list[str] = []
    close = Store.close

    def noted(store: Store) -> None:
        names.append(store.path.name)
        close(store)

    monkeypatch.setattr(Store, "close", noted)
    return names


def do(methods: EngineMethods, method: str, **params: Any) -> Any:
    return methods.call(method, dict.fromkeys(METHODS[method]) | params)


def test_a_load_that_fails_leaves_the_store_before_it(
    methods: EngineMethods, model: str, tmp_path: Path, closed: list[str]
):
    do(methods, "load", model=model, store=str(tmp_path / "a.db"))
    do(methods, "send", text="hello", settings=BRIEF)
    with pytest.raises(QchatError):
        do(methods, "load", model=str(tmp_path / "none"), store=str(tmp_path / "b.db"))
    with pytest.raises(QchatError, match="no conversation 9"):
        do(methods, "load", model=model, store=str(tmp_path / "c.db"), conversation=9)
    assert closed == ["b.db", "c.db"]
    assert len(do(methods, "open", conversation=1).state.turns) == 1


def test_another_store_takes_the_place_of_the_one_before(
    methods: EngineMethods, model: str, tmp_path: Path, closed: list[str]
):
    for name in ("a.db", "a.db", "b.db"):
        do(methods, "load", model=model, store=str(tmp_path / name))
    assert closed == ["a.db"]
    do(methods, "send", text="hello", settings=BRIEF)
    with Store(tmp_path / "b.db") as store:
        assert store.latest() is not None


@pytest.mark.parametrize("error", [ValueError("no such array"), OSError(5, "broken"), RuntimeError()])
def test_idle_work_that_fails_is_forgotten(
    methods: EngineMethods, model: str, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def failing(session: Session) -> Iterator[int]:
        session.live.ids = [1, 2, 3]
        raise error
        yield 0

    do(methods, "load", model=model)
    monkeypatch.setattr(Session, "idle", failing)
    told, output = os.pipe()
    worker = Worker(-1, output)
    worker._run_idle_work(methods, cast(Inbox, SimpleNamespace(requests=SimpleQueue())))
    worker._outbox.close()
    with os.fdopen(told) as lines:
        os.close(output)
        said = lines.read()
    assert f"idle work failed: {error or 'RuntimeError'}" in said
    assert methods._require_session().ids == []
    assert do(methods, "send", text="hello", settings=BRIEF).state.turns


def test_reading_ahead_is_left_after_any_chunk_and_says_how_far_it_is(
    model: str, monkeypatch: pytest.MonkeyPatch
):
    told: list[str] = []
    methods = EngineMethods(lambda _: None, lambda: False, background=told.append)
    do(methods, "load", model=model)
    do(methods, "prime", messages=[{"role": "user", "content": "a " * 60}, ANSWER])
    session = methods._require_session()
    monkeypatch.setattr(session.live, "_timed", TimedChunks(0.15, FakeClock(step=0.15)))
    work = methods.idle_work()
    while not any(READING_AHEAD in line for line in told):
        next(work)
    whole = session.reading_ahead
    assert told[-1] == f"{READING_AHEAD} {FIRST_TIMED_CHUNK}/{whole}"
    assert len(session.ids) == FIRST_TIMED_CHUNK < whole
    work.close()  # as a request makes it
    assert told[-1] == ""
    do(methods, "set_system", text="Be brief.")
    list(methods.idle_work())
    assert len(session.ids) == session.reading_ahead and told[-1] == ""
    assert f"{READING_AHEAD} {session.reading_ahead}/{session.reading_ahead}" in told
    methods.close()


def test_reading_ahead_hides_no_work_of_other_processes():
    told: list[str] = []
    methods = EngineMethods(lambda _: None, lambda: False, background=told.append)
    methods._background("compiling")
    methods._report_ahead(f"{READING_AHEAD} 1/2")
    methods._report_ahead("")
    methods._background("")
    assert told == ["compiling", f"{READING_AHEAD} 1/2", "compiling", ""]
