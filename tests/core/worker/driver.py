"""An engine process driven line by line, for tests of the process itself: no asyncio, every line seen."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from qchat.core.worker.protocol import encode
from tests.paths import ROOT

COMMAND = (sys.executable, "-P", "-m", "qchat.core.worker")
SECONDS = 30.0


class Driver:
    """`received` are all lines so far, as (time, message)."""

    def __init__(
        self, command: tuple[str, ...] = COMMAND, env: Mapping[str, str] | None = None, **popen: Any
    ):
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev"), **(env or {})}
        options: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": pipe} | popen
        self.process = subprocess.Popen(command, env=environment, **options)
        self.received: list[tuple[float, dict[str, Any]]] = []
        self._number, self._rest = 0, b""

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def ask(self, method: str, **params: Any) -> int:
        """Send a request; its number."""
        self._number += 1
        self.write(encode({"id": self._number, "method": method, "params": params}))
        return self._number

    def read(self, seconds: float = SECONDS) -> dict[str, Any] | None:
        """The next line; None when there will be none. Raises TimeoutError."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no line came within {seconds} s")
            data = os.read(self.process.stdout.fileno(), 1 << 20)
            if not data:
                return None
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        message = json.loads(line)
        self.received.append((time.monotonic(), message))
        return message

    def until(self, number: int, event: str) -> dict[str, Any]:
        """The first event of this kind of a call."""
        while (message := self.read()) is not None:
            found = [e for e in message.get("events", ()) if e["event"] == event]
            if message.get("id") == number and found:
                return found[0]
        raise AssertionError(f"the process ended before {event}: {self.last_words()}")

    def end(self, number: int) -> dict[str, Any]:
        """What a call ends with: its result's object, or `{"kind", "message", "exit_code"}`."""
        while (message := self.read()) is not None:
            if message.get("id") == number and message.keys() & {"result", "error"}:
                return message["result"] if "result" in message else message["error"]
        raise AssertionError(f"the process ended during a call: {self.last_words()}")

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        return self.end(self.ask(method, **params))

    def events(self, number: int) -> list[dict[str, Any]]:
        return [e for _, line in self.received if line.get("id") == number for e in line.get("events", ())]

    def last_words(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()[-2000:]

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)
