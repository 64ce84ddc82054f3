"""The decode step in C, compiled once for all tests that want it."""

import pytest

from qchat.core.native.compiler import find_compiler
from qchat.core.native.library import Finder, Library


@pytest.fixture(scope="session")
def library() -> Library:
    if find_compiler() is None:
        pytest.skip("there is no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCHAT_NATIVE", "on")
        found = Finder().find()
    assert found is not None
    return found
