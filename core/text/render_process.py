"""A process that renders templates, within a budget of CPU time and memory.

It stays warm from one rendering to the next. A rendering that exceeds its budget ends it, and the next one
starts another; the end of this process ends it too.
"""

import atexit
import json
import os
import selectors
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from ..machine.memory import resident_nbytes

RENDERER = Path(__file__).with_name("jinja_renderer.py")
INHERITED = ("PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")  # no tokens or keys
EXCEEDED = ": stopped, it takes more time or memory than a conversation of this size needs"
FAILED = ": the process that renders templates could not run"
BASE_SECONDS, SECONDS_PER_BYTE = 3.0, 2e-6  # of CPU time; a long conversation takes about 5e-8 a byte
BASE_NBYTES, NBYTES_PER_BYTE = 512 << 20, 32
HEADROOM = 1  # how many times what it may occupy the process may reserve, where the system limits that
POLL_SECONDS = 0.02
WALL_FACTOR = 15  # of the CPU time, for a machine that is busy or swaps


class Budget(NamedTuple):
    """What one rendering may take: CPU time, and bytes of the process and of the reply."""

    seconds: float
    nbytes: int
    reply_nbytes: int

    @classmethod
    def of(cls, input_nbytes: int) -> "Budget":
        """Return the budget for a template and messages of this size."""
        return cls(
            BASE_SECONDS + SECONDS_PER_BYTE * input_nbytes,
            BASE_NBYTES + NBYTES_PER_BYTE * input_nbytes,
            (BASE_NBYTES + NBYTES_PER_BYTE * input_nbytes) // 16,
        )


class RenderProcess:
    """The process, started when it is first needed and ended with this one."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    @property
    def running(self) -> subprocess.Popen[bytes] | None:
        """The process that waits for the next request."""
        return self._process

    def request(self, inputs: str) -> dict[str, str]:
        """Return the "text" or the "error" for `inputs`, a JSON object."""
        allowed = Budget.of(len(inputs))
        limits = json.dumps({"seconds": allowed.seconds, "nbytes": HEADROOM * allowed.nbytes})
        line = f"{limits[:-1]}, {inputs[1:]}\n".encode()
        with self._lock:
            reply = None
            try:
                reply = _read_line(self._send(line), allowed)
            except BrokenPipeError:
                pass
            finally:  # what comes after an interrupt or a breach must not be taken for the next reply
                status = 0 if reply else self.close()
        if reply:
            return json.loads(reply)
        return {"error": FAILED if status == 1 else EXCEEDED}

    def _send(self, line: bytes) -> subprocess.Popen[bytes]:
        """Write `line`, to a new process where there is none or it was ended meanwhile."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        self._process = self._process or _start()
        assert self._process.stdin
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return self._process

    def close(self) -> int:
        """End the process, if any; returns its status, 1 where it had failed by itself."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
        process.kill()
        process.communicate()
        return process.returncode


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(str(Path(folder).absolute()) for folder in sys.path if folder)
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", "-S", str(RENDERER)],  # -S: the path is given, looking for it takes time
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**environment, "PYTHONPATH": path},
        start_new_session=True,  # ctrl+c in the terminal is not for it
    )


def _read_line(process: subprocess.Popen[bytes], allowed: Budget) -> bytes | None:
    """Return the line that `process` writes; None where it ends first or exceeds its budget."""
    assert process.stdout
    line = bytearray()
    end = time.monotonic() + WALL_FACTOR * allowed.seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if selector.select(POLL_SECONDS):
                piece = os.read(process.stdout.fileno(), 1 << 20)
                line += piece
                if not piece or len(line) > allowed.reply_nbytes:
                    return None
            elif time.monotonic() > end or resident_nbytes(process.pid) > allowed.nbytes:
                return None
    return bytes(line)
