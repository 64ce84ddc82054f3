"""The fake server of tools for a test: as a specification, or listening on loopback."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from qchat.tui.tools.server_specs import ServerSpec

FAKE = Path(__file__).with_name("mcp_fake.py")
needs_mcp = pytest.mark.skipif(find_spec("mcp") is None, reason="needs the extra `tools`")


def stdio_command(*wishes: str) -> list[str]:
    return [sys.executable, str(FAKE), "stdio", *wishes]


def stdio_spec(name: str, *wishes: str) -> ServerSpec:
    return ServerSpec(name, "settings", tuple(stdio_command(*wishes)))


@contextmanager
def serving_http(*wishes: str) -> Iterator[str]:
    """The address of a fake server that ends with the block."""
    with subprocess.Popen(
        [sys.executable, str(FAKE), "http", *wishes], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()
