"""The front end's end of the pipes: starts the engine, calls it, and says in one sentence how it ended.

Owns the pipes. Calls are concurrent; each yields batches of events and ends with a result or an error. When
the process ends, every open call ends with EngineDied. Refuses a process that writes anything but messages of
the protocol.
"""

import asyncio
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...core.errors import QchatError, UsageError
from ...core.events import Announcement, Background, CallEvent, LogLine, Ready
from ...core.quoting import quote_value
from ...core.worker.protocol import (
    FRONT_END_VARIABLE,
    MAX_LINE_NBYTES,
    PROTOCOL_VERSION,
    Cancelled,
    Failure,
    decode,
    encode,
)
from .decoding import Batch, decode_event, decode_events, decode_result, decode_value

# -P: the current folder must not provide the engine's modules
COMMAND = (sys.executable, "-P", "-m", "qchat.core.worker")
LOG_LINES = 200
LOG_LINE_CHARACTERS = 2000
START_SECONDS = 60.0
# an engine that was told to end does so within two seconds
STOP_SECONDS = 4.0
MOST_RANKS = 64
# begins a launcher's line about how its processes ended, which does not say why
LAUNCHER_SAYS = "[WARN] Node with rank"
# ports below those that systems hand out themselves, and how often a place among them is tried
PORTS, TRIES = (10_000, 30_000), 100

Process = subprocess.Popen[bytes]


class EngineError(QchatError):
    """An error that ended a call; `kind` is the name of its class in the engine."""

    def __init__(self, message: str, kind: str = "", exit_code: int = 1):
        super().__init__(message)
        self.kind, self.exit_code = kind, exit_code


class EngineDied(QchatError):
    """The error of calls whose engine process ended; the message says how."""


def shared_command(*, ranks: int | None = None, hostfile: str | None = None) -> tuple[str, ...]:
    """Return the command of an engine that several processes share.

    They are `ranks` processes of this machine, or one on each machine of a hostfile of `mlx.launch`, which
    begins with this machine. Raises UsageError if MLX's launcher is not installed or no ports are free.
    """
    beside = Path(sys.executable).with_name("mlx.launch")
    launcher = str(beside) if beside.exists() else shutil.which("mlx.launch")
    if launcher is None:
        raise UsageError("mlx.launch was not found: it comes with MLX and belongs beside python")
    places = ("--hostfile", hostfile) if hostfile else ("-n", str(ranks), *_free_ports(ranks or 0))
    return (launcher, *places, "--", *COMMAND)


def _free_ports(count: int) -> tuple[str, ...]:
    """Choose ports for the ranks of one machine; the launcher's own choice may be in use by another chat."""
    for _ in range(TRIES):
        first = random.randrange(*PORTS)
        with suppress(OSError):
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
            return ("--starting-port", str(first), "--nccl-port", str(first))
    raise UsageError(f"found no {count} adjacent free ports for the ranks")


def behind_launcher() -> dict[str, str]:
    """Return the environment of an engine that is to end with this process without being its child."""
    return {FRONT_END_VARIABLE: str(os.getpid())}


def spawn(command: Sequence[str] = COMMAND, env: Mapping[str, str] | None = None) -> Process:
    """Start an engine process in a session of its own, out of reach of the terminal's signals.

    It finds modules where this process does. Raises EngineDied if it cannot be started.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, **(env or {})}
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            list(command), stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
        )
    except OSError as problem:
        raise EngineDied(f"the engine could not be started: {problem.strerror} ({command[0]})") from problem


_early: list[tuple[Sequence[str], Process]] = []


def spawn_early(command: Sequence[str] = COMMAND, env: Mapping[str, str] | None = None) -> None:
    """Start an engine for the first EngineClient with this command, so that both import at the same time."""
    if not _early:
        _early.append((command, spawn(command, env)))


class Call:
    """One request under way: iterate over it for batches of events, await `result()` for its end."""

    def __init__(self, client: "EngineClient", number: int, method: str):
        self.number, self.method = number, method
        self._client = client
        self._batches: asyncio.Queue[Batch | None] = asyncio.Queue()
        self._result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._result.add_done_callback(_mark_retrieved)

    async def __aiter__(self) -> AsyncIterator[Batch]:
        while (batch := await self._batches.get()) is not None:
            yield batch

    async def result(self) -> Any:
        """Wait for the end of the call and return its result, of the method's type in `core.worker.wire`.

        Raises EngineError, Cancelled, EngineDied.
        """
        return await asyncio.shield(self._result)

    def cancel(self) -> None:
        """Ask the engine to stop the call, which still ends with a result or an error."""
        if not self._result.done():
            self._client.call("cancel", id=self.number)

    def deliver(self, batch: Batch) -> None:
        """Add a batch of events."""
        self._batches.put_nowait(batch)

    def end(self, outcome: Any) -> None:
        """End the iteration, and let `result` return `outcome`, or raise it if it is an error."""
        self._batches.put_nowait(None)
        if self._result.done():
            return
        if isinstance(outcome, QchatError):
            self._result.set_exception(outcome)
        else:
            self._result.set_result(outcome)


def _mark_retrieved(future: "asyncio.Future[Any]") -> None:
    """Keep asyncio from complaining about a call whose result nobody awaits."""
    if not future.cancelled():
        future.exception()


class EngineClient:
    """One engine process. `on_death` is called once, with a sentence, unless `stop` ended it.

    `log` holds the last lines that the engine wrote to its stderr. `on_background` is called with one line
    about the engine's work beside all calls, and with an empty one when that has ended.
    """

    def __init__(self, command: Sequence[str] = COMMAND, env: Mapping[str, str] | None = None):
        self.on_death: Callable[[str], None] | None = None
        self.on_background: Callable[[str], None] | None = None
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self._command, self._env = command, env or {}
        # a launcher stands between this process and the engine
        self._is_launched = FRONT_END_VARIABLE in self._env
        self._process: Process | None = None
        self._input: asyncio.WriteTransport | None = None
        self._reading: list[asyncio.Task[None]] = []
        self._calls: dict[int, Call] = {}
        self._number = 0
        self._first: asyncio.Future[None] | None = None
        self._reason = ""
        self._stopping = False

    @property
    def alive(self) -> bool:
        return self._process is not None and not self._reason

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Start the process, or adopt the one started early; return when it is ready.

        Raises EngineDied if it does not start or speaks another protocol.
        """
        early = _early.pop()[1] if _early and _early[0][0] == self._command else None
        self._process = process = early or spawn(self._command, self._env)
        loop = asyncio.get_running_loop()
        self._first = loop.create_future()
        self._first.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._input, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, process.stdin)
        lines, log = await _reader(process.stdout, MAX_LINE_NBYTES), await _reader(process.stderr, 1 << 16)
        self._reading = [
            asyncio.create_task(self._listen(lines, process)),
            asyncio.create_task(self._keep_log(log)),
        ]
        try:
            await asyncio.wait_for(asyncio.shield(self._first), START_SECONDS)
        except TimeoutError:
            self.kill()
            raise EngineDied(f"the engine was not ready after {START_SECONDS:.0f} s") from None

    def call(self, method: str, **params: Any) -> Call:
        """Send a request at once, without the parameters that are None.

        Raises EngineDied if no engine runs, UsageError for a request that is too long.
        """
        self._number += 1
        call = Call(self, self._number, method)
        if not self.alive or self._input is None:
            raise EngineDied(self._reason or "the engine is not running")
        line = encode(
            {
                "id": call.number,
                "method": method,
                "params": {name: value for name, value in params.items() if value is not None},
            }
        )
        if len(line) > MAX_LINE_NBYTES:
            raise UsageError(f"the request {method} is longer than {MAX_LINE_NBYTES >> 20} MiB")
        self._calls[call.number] = call
        self._input.write(line)
        return call

    async def request(self, method: str, **params: Any) -> Any:
        """Call and return the result; ignore the events. Raises EngineError, Cancelled, EngineDied."""
        return await self.call(method, **params).result()

    async def stop(self) -> None:
        """Close the input of the process and wait for its end; kill it if that takes too long."""
        self._stopping = True
        if self._process is None:
            return
        if not self._reading:  # `start` has not connected the pipes yet
            self.kill()
            await asyncio.to_thread(self._process.wait)
            return
        if self._input is not None:
            if self._is_launched:  # a launcher passes lines on, but not the end of the input
                self._ask_to_end()
            self._input.close()
        _, late = await asyncio.wait(self._reading, timeout=STOP_SECONDS)
        if late:
            self.kill()
            await asyncio.wait(late)

    def _ask_to_end(self) -> None:
        for call in list(self._calls.values()):
            call.cancel()
        with suppress(EngineDied):
            self.call("shutdown")

    def kill(self) -> None:
        """End the process now."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _listen(self, lines: asyncio.StreamReader, process: Process) -> None:
        problem = ""
        try:
            while line := await lines.readline():
                if self._is_launched and not line.startswith(b"{"):
                    self._note(line.decode(errors="replace"))  # a shell in between wrote it
                else:
                    self._take(decode(line))
        except (UsageError, ValueError) as error:  # readline raises ValueError for a line without end
            problem = f"the engine wrote something that is no message ({error})"
            process.kill()
        except OSError as error:
            problem = f"the engine's output could not be read ({error.strerror})"
            process.kill()
        code = await asyncio.to_thread(process.wait)
        await asyncio.wait([self._reading[1]], timeout=1.0)  # the last words on stderr
        words = [line for line in self.log if not line.startswith(LAUNCHER_SAYS)] or self.log
        self._end(problem or _how_it_ended(code, words[-1] if words else ""))

    def _take(self, message: dict[str, Any]) -> None:
        """Decode a message and deliver it; a call that has ended gets nothing more.

        Raises ValueError for a message that is not the protocol's.
        """
        number = message.get("id")
        call = self._calls.get(number) if isinstance(number, int) else None
        match message:
            case {"events": list(events)} if call:
                call.deliver(decode_events(call.method, events))
            case {"result": result} if call:
                self._end_call(call, decode_result(call.method, result))
            case {"error": error}:
                problem = _error(decode_value(error, Failure, "error"))
                if call:
                    self._end_call(call, problem)
                else:
                    self._note(str(problem))
            case {"event": "ready", "protocol": version} if version != PROTOCOL_VERSION:
                self._refuse(version)
            case {"event": _} if call:
                call.deliver(decode_events(call.method, [message]))
            case {"event": _}:
                self._take_announcement(decode_event(message))

    def _take_announcement(self, event: Announcement | CallEvent) -> None:
        match event:
            case Ready():
                if self._first is not None and not self._first.done():
                    self._first.set_result(None)
            case Background(text):
                if self.on_background is not None:
                    self.on_background(text)
            case LogLine(text):
                self._note(text)

    def _end_call(self, call: Call, outcome: Any) -> None:
        del self._calls[call.number]
        call.end(outcome)

    def _refuse(self, version: object) -> None:
        """End an engine of another version, whose other messages may have other types too."""
        found = f"protocol {quote_value(version)}, and this front end protocol {PROTOCOL_VERSION}"
        if self._first is not None and not self._first.done():
            self._first.set_exception(EngineDied(f"the engine speaks {found}: install both from one version"))
        self._stopping = True
        self.kill()

    async def _keep_log(self, log: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await log.read(1 << 14):
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-LOG_LINE_CHARACTERS:]
            for line in lines:
                self._note(line.decode(errors="replace"))
        self._note(rest.decode(errors="replace"))

    def _note(self, text: str) -> None:
        text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
        if text.strip():
            self.log.append(text[:LOG_LINE_CHARACTERS])

    def _end(self, reason: str) -> None:
        self._reason = reason
        if self._input is not None:
            self._input.close()
        died = EngineDied(reason)
        if self._first is not None and not self._first.done():
            self._first.set_exception(died)
            self._stopping = True  # `start` raises it
        calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.end(died)
        if self.on_death is not None and not self._stopping:
            self.on_death(reason)


def _error(failure: Failure) -> QchatError:
    if failure.kind == Cancelled.__name__:
        return Cancelled(failure.message)
    return EngineError(failure.message, failure.kind, failure.exit_code)


def _how_it_ended(code: int, last_words: str) -> str:
    """Return one sentence about an exit code, which is negative for a signal."""
    if code == -signal.SIGKILL:
        return "the engine was killed (SIGKILL), perhaps because the machine ran out of memory"
    said = f": {last_words}" if last_words else ""
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return f"the engine was ended by {name}{said}"
    return f"the engine ended{f' with exit code {code}' if code else ''}{said}"


async def _reader(pipe: Any, limit: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=limit)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader
