"""A process that applies what others wrote, templates or tokenizers, within a budget of CPU time and memory.

It stays warm from one request to the next. A request that exceeds its budget ends it, and the next one starts
another; the end of this process ends it too.
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
from typing import Any, NamedTuple

from ..machine.memory import resident_nbytes

PROGRAM = Path(__file__).with_name("limited_program.py")
INHERITED = ("PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")  # no tokens or keys
BASE_SECONDS, SECONDS_PER_BYTE = 3.0, 2e-6  # of CPU time; a long conversation takes about 5e-8 a byte
BASE_NBYTES, NBYTES_PER_BYTE = 512 << 20, 32
HEADROOM = 1  # how many times what it may occupy the process may reserve, where the system limits that
POLL_SECONDS = 0.02
WALL_FACTOR = 15  # of the CPU time, for a machine that is busy or swaps


class Budget(NamedTuple):
    """What one request may take: CPU time, and bytes of the process and of the reply."""

    seconds: float
    nbytes: int
    reply_nbytes: int

    @classmethod
    def of(cls, input_nbytes: int, factor: int = 1) -> "Budget":
        """Return the budget for inputs of this size, of which `factor` multiplies the constant part."""
        nbytes = factor * BASE_NBYTES + NBYTES_PER_BYTE * input_nbytes
        return cls(factor * BASE_SECONDS + SECONDS_PER_BYTE * input_nbytes, nbytes, nbytes // 16)


class LimitedProcess:
    """The process, started when it is first needed and ended with this one."""

    def __init__(self, program: Path, task: str, *, exceeded: str, factor: int = 1):
        """Run the function `answer` of `program`, which does `task`.

        The error of a request beyond its budget is `exceeded`; `factor` is that of `Budget.of`.
        """
        self._program, self._factor = program, factor
        self._exceeded, self._failed = exceeded, f": the process that {task} could not run"
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    @property
    def running(self) -> subprocess.Popen[bytes] | None:
        """The process that waits for the next request."""
        return self._process

    def request(self, inputs: str) -> dict[str, Any]:
        """Return the reply to `inputs`, a JSON object; it has the key "error" where there is none."""
        allowed = Budget.of(len(inputs), self._factor)
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
        return {"error": self._failed if status == 1 else self._exceeded}

    def _send(self, line: bytes) -> subprocess.Popen[bytes]:
        """Write `line`, to a new process where there is none or it was ended meanwhile."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        self._process = self._process or _start(self._program)
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


def _start(program: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(str(Path(folder).absolute()) for folder in sys.path if folder)
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return subprocess.Popen(
        # -S: the path is given, looking for it takes time
        [sys.executable, "-P", "-S", str(PROGRAM), str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**environment, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
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
