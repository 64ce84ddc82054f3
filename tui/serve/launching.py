"""Finds a running server, or starts one for as long as a tool runs."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

import httpx2
import msgspec

from ...core.errors import GenerationError, UsageError
from .app import PROGRAM
from .defaults import KEY_VARIABLE
from .tools import Connection, Setup, Tool

START_SECONDS, STOP_SECONDS, PROBE_SECONDS = 600.0, 10.0, 2.0


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def find_server(url: str, key: str | None) -> Connection | None:
    """Return the server at an address; None if none answers.

    Raises UsageError for a wrong key, an address that is none, and another program, which never gets the key.
    """
    if not _answers(url):
        return None
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx2.get(f"{url}/v1/models", headers=headers, timeout=PROBE_SECONDS)
        if response.status_code == 401:
            raise UsageError(f"the server at {url} wants another key: --api-key KEY")
        models = msgspec.json.decode(response.content, type=_Models)
    except (httpx2.HTTPError, msgspec.DecodeError):
        return None
    return Connection(url, models.data[0].id, key) if models.data else None


def _answers(url: str) -> bool:
    """Tell whether a server of qchat answers. Raises UsageError if another program does."""
    try:
        response = httpx2.get(f"{url}/health", timeout=PROBE_SECONDS)
    except httpx2.InvalidURL as error:
        raise UsageError(f"{url} is not an address: {error}") from error
    except httpx2.HTTPError:
        return False
    if response.headers.get("server") != PROGRAM:
        raise UsageError(f"another program answers at {url}: choose another --port")
    return True


@contextlib.contextmanager
def started_server(arguments: Sequence[str], url: str, key: str | None) -> Iterator[Connection]:
    """Start `qchat serve` with `arguments`, wait until it answers, and end it at last.

    Raises GenerationError with its last words if it ends before.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {KEY_VARIABLE: key} if key else {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "qchat.tui", "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            yield _wait_for(process, url, key, log)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            if process.returncode is None:
                process.kill()
                process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", url: str, key: str | None, log: IO[bytes]) -> Connection:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if (server := find_server(url, key)) is not None:
            return server
        time.sleep(0.1)
    log.seek(0)
    words = log.read().decode(errors="replace").strip().splitlines()
    raise GenerationError(words[-1].removeprefix("qchat: ") if words else "the server did not start")


def run_tool(tool: Tool, setup: Setup, arguments: Sequence[str]) -> int:
    """Run the tool in this terminal and return its exit code. Raises UsageError if it is not installed."""
    program = shutil.which(tool.command)
    if program is None:
        raise UsageError(f"{tool.about} is not installed: there is no command {tool.command}")
    child = subprocess.Popen([program, *setup.arguments, *arguments], env={**os.environ, **setup.environment})
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # the tool decides what ctrl+c means
            return child.wait()


def describe(setup: Setup, command: str, key: str | None) -> str:
    """Return the command line that does the same, with `KEY` in the place of a real key."""
    pairs = (f"{name}={shlex.quote(value)}" for name, value in setup.environment.items())
    line = " ".join([*pairs, command, *map(shlex.quote, setup.arguments)])
    return line.replace(key, "KEY") if key else line
