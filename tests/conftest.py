"""Every test runs in a home of its own: no user's files, no network, one locale, seed and screen size."""

import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

OURS = ("QCHAT_", "HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "LC_", "TEXTUAL", "MLX_", "CLICOLOR")
UNSET = ("LANG", "LANGUAGE", "NO_COLOR", "FORCE_COLOR", "COLORTERM", "EDITOR", "VISUAL", "PYTHONPATH")
LOOPBACK = ("127.0.0.1", "::1", "localhost")

_session_folder = Path(tempfile.mkdtemp(prefix="qchat-tests-"))


def pytest_configure() -> None:
    """Importing test modules must not touch the user's folders either, so this comes before collection."""
    for name in list(os.environ):
        if name.startswith(OURS) or name in UNSET:
            del os.environ[name]
    os.environ |= {
        # the step in C is `on` in its own tests; with TESTS_NATIVE=on everywhere. Never `auto`: it would come
        # into use in the middle of a test
        "QCHAT_NATIVE": os.environ.get("TESTS_NATIVE", "off"),
        # how many tokens are drafted depends on the machine's speed, and the rounding of states on that
        "QCHAT_DRAFTING": "off",
        # what one test measures must not choose how another one computes
        "QCHAT_TUNE": "off",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "TERM": "xterm-256color",
        "COLUMNS": "100",
        "LINES": "30",
        "HF_HUB_OFFLINE": "1",
        "QCHAT_COMPILE": "off",  # no test waits for a compiler, but those about it
        "HOME": str(_session_folder),
        # shared by all tests: the renamed BLAS in it takes a second to make
        "XDG_CACHE_HOME": str(_session_folder / "cache"),
    }
    time.tzset()


def pytest_unconfigure() -> None:
    shutil.rmtree(_session_folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def hermetic(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own home; where the user's files would be, there is nothing yet."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in ("CONFIG", "DATA", "STATE", "RUNTIME"):
        suffix = "DIR" if name == "RUNTIME" else "HOME"
        monkeypatch.setenv(f"XDG_{name}_{suffix}", str(home / name.lower()))
    for method in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, method, _guarded(getattr(socket.socket, method)))
    monkeypatch.setattr(socket, "getaddrinfo", _guarded_lookup)
    _seed(0)
    return home


def _guarded(connect):
    def guard(self: socket.socket, address):
        if self.family != socket.AF_UNIX and address[0] not in LOOPBACK:
            raise RuntimeError(f"a test tried to reach the network at {address}")
        return connect(self, address)

    return guard


_lookup = socket.getaddrinfo


def _guarded_lookup(host, *args, **kwargs):
    if host not in (None, *LOOPBACK):
        raise RuntimeError(f"a test tried to look up {host}")
    return _lookup(host, *args, **kwargs)


def _seed(seed: int) -> None:
    """Seeds the generators of what is imported already; a test that needs no mlx pays for none."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].random.seed(seed)
