"""The store of conversations that tests begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qchat.core import Store


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    request.getfixturevalue("no_waiting_for_the_disk")
    with Store(tmp_path / "conversations.db") as opened:
        yield opened
