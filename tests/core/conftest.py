"""The decode step in C, compiled once for all tests that want it, and databases that do not wait."""

import pytest

from qchat.core.native.compiler import find_compiler
from qchat.core.native.library import Finder, Library
from qchat.core.storage import database


@pytest.fixture(scope="session")
def library() -> Library:
    if find_compiler() is None:
        pytest.skip("there is no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCHAT_NATIVE", "on")
        found = Finder().find()
    assert found is not None
    return found


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SYNCHRONOUS", "OFF")
