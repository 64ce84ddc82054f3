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
from qchat.core.storage.store import Store
from qchat.core.worker.channel import Inbox
from qchat.core.worker.methods import Desk
from qchat.core.worker.process import Worker
from qchat.core.worker.protocol import METHODS
from tests.checkpoints import write_checkpoint

BRIEF = {"temperature": 0.0, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder)
    return str(folder)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk(lambda _: None, lambda: False)
    yield desk
    desk.close()


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


def do(desk: Desk, method: str, **params: Any) -> dict[str, Any]:
    return desk.do(method, dict.fromkeys(METHODS[method]) | params)


def test_a_load_that_fails_leaves_the_store_before_it(
    desk: Desk, model: str, tmp_path: Path, closed: list[str]
):
    do(desk, "load", model=model, store=str(tmp_path / "a.db"))
    do(desk, "send", text="hello", settings=BRIEF)
    with pytest.raises(QchatError):
        do(desk, "load", model=str(tmp_path / "none"), store=str(tmp_path / "b.db"))
    with pytest.raises(QchatError, match="no conversation 9"):
        do(desk, "load", model=model, store=str(tmp_path / "c.db"), conversation=9)
    assert closed == ["b.db", "c.db"]
    assert len(do(desk, "open", conversation=1)["state"]["turns"]) == 1


def test_another_store_takes_the_place_of_the_one_before(
    desk: Desk, model: str, tmp_path: Path, closed: list[str]
):
    for name in ("a.db", "a.db", "b.db"):
        do(desk, "load", model=model, store=str(tmp_path / name))
    assert closed == ["a.db"]
    do(desk, "send", text="hello", settings=BRIEF)
    with Store(tmp_path / "b.db") as store:
        assert store.latest() is not None


@pytest.mark.parametrize("error", [ValueError("no such array"), OSError(5, "broken"), RuntimeError()])
def test_idle_work_that_fails_is_forgotten(
    desk: Desk, model: str, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def failing(session: Session) -> Iterator[int]:
        session.live.ids = [1, 2, 3]
        raise error
        yield 0

    do(desk, "load", model=model)
    monkeypatch.setattr(Session, "idle", failing)
    told, output = os.pipe()
    worker = Worker(-1, output)
    worker._use_spare_time(desk, cast(Inbox, SimpleNamespace(waiting=SimpleQueue())))
    worker._outbox.close()
    with os.fdopen(told) as lines:
        os.close(output)
        said = lines.read()
    assert f"reading ahead failed: {error or 'RuntimeError'}" in said
    assert desk._here.ids == []
    assert do(desk, "send", text="hello", settings=BRIEF)["state"]["turns"]
