"""A tiny model on a hub on the loopback, and what its tests ask again and again."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qchat.core.errors import ModelError, QchatError
from qchat.core.hub import cache as hubcache
from qchat.core.hub import library, listing, tasks, transfer
from qchat.core.hub.download import download_model
from qchat.core.hub.library import Locations
from qchat.core.hub.listing import plan_download
from tests.checkpoints import write_checkpoint
from tests.hub_server import Hub, Repo, point_to

Files = dict[str, bytes]
ID = "me/tiny"
QUICK = 0.4  # seconds in which hasty tests lose patience


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, shards=3)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return Repo.of(folder).files


@pytest.fixture
def repo(files: Files) -> Repo:
    return Repo(dict(files))


@pytest.fixture
def server(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub({ID: repo}) as running:
        point_to(running.url, tmp_path / "hub", monkeypatch)
        yield running


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that takes seconds for people's sake takes a fraction of one."""
    for module in (transfer, listing):
        monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(module, "ANSWER_SECONDS", QUICK)
    monkeypatch.setattr(transfer, "SERVER_ERROR_SECONDS", QUICK)
    monkeypatch.setattr(transfer, "CONNECTION_LOST_SECONDS", QUICK)
    monkeypatch.setattr(tasks, "GRACE_SECONDS", 4.0)  # so that no thread outlives its test


def pull(**options: Any) -> Path:
    return download_model(plan_download(ID), **options)


def refusal(call: Callable[[], object], error: type[QchatError] = ModelError) -> str:
    """The sentence of the error that `call` raises, which comes in time."""
    begin = time.monotonic()
    with pytest.raises(error) as caught:
        call()
    assert time.monotonic() - begin < 60  # retries would go on for minutes
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_nothing_to_load() -> None:
    """No folder anywhere in the cache passes for a model."""
    for config in hubcache.cache_folder().rglob("config.json"):
        assert library.load_problem(config.parent) is not None
    with pytest.raises(library.ModelNotDownloaded):
        library.find_model(ID, Locations(folders=(), used=Path("/nowhere")))
