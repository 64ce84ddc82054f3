"""Programs that tools run: bounded in time and output, and killed with all their children."""

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_OUTPUT_NBYTES = 1 << 20
POLL_SECONDS = 0.01
# how long output may still come once the program has ended; a child may hold the pipe for ever
DRAIN_SECONDS = 0.5
# no colours, no pagers, no questions
QUIET = {"TERM": "dumb", "NO_COLOR": "1", "PAGER": "cat", "GIT_PAGER": "cat", "GIT_TERMINAL_PROMPT": "0"}


@dataclass(frozen=True)
class Finished:
    """What a program wrote, and its exit code; None where its time was up."""

    output: str
    code: int | None


async def run_program(command: Sequence[str], folder: Path, seconds: float) -> Finished:
    """Run a program in a session of its own; whatever happens, none of its processes is left.

    Its output loses its middle beyond MAX_OUTPUT_NBYTES. Raises OSError if it cannot be started.
    """
    process = await _start(command, folder)
    output = bytearray()
    reading = asyncio.create_task(_read(process, output))
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await _ended(process)
        code = process.returncode
        if code is not None:
            await asyncio.wait([reading], timeout=DRAIN_SECONDS)
    finally:
        _kill(process)
        cancelled = await _settle(asyncio.ensure_future(_close(process, reading)))
        if cancelled is not None:
            raise cancelled
    return Finished(output.decode(errors="replace"), code)


async def _start(command: Sequence[str], folder: Path) -> asyncio.subprocess.Process:
    """Start a program; a cancel that comes meanwhile kills what has just begun. Raises OSError."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **QUIET},
            start_new_session=True,
        )
    )
    cancelled = await _settle(starting)
    process = starting.result()
    if cancelled is not None:
        _kill(process)
        await _settle(asyncio.ensure_future(_ended(process)))
        _drop(process)
        raise cancelled
    return process


async def _settle(task: "asyncio.Future[Any]") -> asyncio.CancelledError | None:
    """Wait until `task` is done, whatever cancels come meanwhile; return the last of them."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:
            break  # which `result` raises
    return cancelled


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill a program with all processes of its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait for the end of the program itself: `wait` also waits for the children that hold its pipe."""
    while process.returncode is None:
        await asyncio.sleep(POLL_SECONDS)


async def _read(process: asyncio.subprocess.Process, output: bytearray) -> None:
    while process.stdout is not None and (chunk := await process.stdout.read(1 << 16)):
        output += chunk
        if len(output) > 2 * MAX_OUTPUT_NBYTES:
            del output[MAX_OUTPUT_NBYTES // 2 : -MAX_OUTPUT_NBYTES // 2]


async def _close(process: asyncio.subprocess.Process, reading: "asyncio.Task[None]") -> None:
    await _ended(process)
    await asyncio.wait([reading], timeout=DRAIN_SECONDS)
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading
    _drop(process)


def _drop(process: asyncio.subprocess.Process) -> None:
    """Close the pipe, which a process of another session may still hold."""
    process._transport.close()  # pyright: ignore[reportAttributeAccessIssue]
