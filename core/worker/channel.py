"""The two threads between an engine and its pipes: one reads requests, one writes events at a bounded pace.

Neither waits for the model, nor the model for them. What was not fetched yet is merged, so a front end that
is slow gets fewer and larger pieces. The reader ends the process when nobody is left to serve.
"""

import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ..errors import QchatError, UsageError
from .protocol import FRONT_VARIABLE, MAX_LINE_NBYTES, URGENT_METHODS, Request, decode, encode, error_message

LINES_PER_SECOND = 60
MEMORY_SECONDS = 0.25
# what is under way, a product of large matrices say, gets this long to end by itself
GRACE_SECONDS = 2.0
PARENT_SECONDS = 1.0
READ_NBYTES = 1 << 16
# stands among requests for: look whether there is work to do besides
WAKE = Request(0, "", {})
# of these only the last one tells anything
REPLACED = ("load", "prefill", "progress", "memory")
JOINED = ("thought", "text")


class Outbox:
    """Writes lines to the file descriptor `output`; events at most `LINES_PER_SECOND` times a second."""

    def __init__(self, output: int, figures: Callable[[], Mapping[str, Any] | None]):
        """`figures` tells of the memory, every `MEMORY_SECONDS` while a call is under way."""
        self._output, self._figures = output, figures
        self._change = threading.Condition()
        self._lines: list[bytes] = []
        self._events: list[dict[str, Any]] = []
        self._call: int | None = None
        self._closed = False
        self._told = self._remembered = 0.0
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def begin(self, call: int) -> None:
        """From now on events are those of `call`."""
        with self._change:
            self._call = call
            self._change.notify()

    def event(self, event: dict[str, Any]) -> None:
        """Tell an event of the call under way, soon."""
        with self._change:
            first = not self._events
            _merge(self._events, event)
            if first:
                self._change.notify()

    def end(self, call: int, result: dict[str, Any] | QchatError) -> None:
        """End `call`, with its events before it."""
        failed = isinstance(result, QchatError)
        line = encode(error_message(result, call) if failed else {"id": call, "result": result})
        if len(line) > MAX_LINE_NBYTES:
            line = encode(error_message(UsageError("the answer does not fit into a line"), call))
        with self._change:
            if call == self._call:
                self._flush()
                self._call = None
            self._lines.append(line)
            self._change.notify()

    def say(self, message: Mapping[str, Any]) -> None:
        """Write a message that is of no call."""
        with self._change:
            self._lines.append(encode(message))
            self._change.notify()

    def close(self) -> None:
        """Write what there is and end; where nobody reads it, only try to."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(GRACE_SECONDS)

    def _run(self) -> None:
        with suppress(OSError):  # nobody reads any more, and whoever reads requests will notice
            while not self._closed or self._lines or self._events:
                self._write(self._next())

    def _next(self) -> bytes:
        """What is to be written now, after waiting for it and for its time."""
        with self._change:
            self._change.wait_for(
                lambda: self._lines or self._events or self._closed,
                None if self._call is None else self._remembered + MEMORY_SECONDS - time.monotonic(),
            )
            self._change.wait_for(
                lambda: self._lines or self._closed, self._told + 1 / LINES_PER_SECOND - time.monotonic()
            )
            self._remember()
            self._flush()
            lines, self._lines = self._lines, []
            return b"".join(lines)

    def _remember(self) -> None:
        now = time.monotonic()
        if self._call is not None and now - self._remembered >= MEMORY_SECONDS:
            self._remembered = now
            if figures := self._figures():
                _merge(self._events, {"event": "memory", **figures})

    def _flush(self) -> None:
        if self._events:
            self._lines.append(encode({"id": self._call, "events": self._events}))
            self._events, self._told = [], time.monotonic()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._output, rest) :]


def _merge(events: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """Append `event`; or let it lengthen the one before it, or take its place, where both are of one kind."""
    last, kind = events[-1] if events else {}, event["event"]
    if last.get("event") != kind or kind not in REPLACED + JOINED:
        events.append(event)
    elif kind in REPLACED:
        events[-1] = event
    else:
        events[-1] = {
            "event": kind,
            "text": last["text"] + event["text"],
            "tokens": last["tokens"] + event["tokens"],
        }


class Inbox:
    """Requests from the file descriptor `source`, in `waiting`; None there means the end, WAKE no request.

    `urgent` is called, on this thread, with requests that are served at once; `refused` with a line's error
    and the number of its call, if it has one; `left` when the other side has gone or SIGTERM came. The
    process ends `GRACE_SECONDS` later, whatever it does.
    """

    def __init__(
        self,
        source: int,
        urgent: Callable[[Request], None],
        refused: Callable[[UsageError, int | None], None],
        left: Callable[[], None],
    ):
        self.waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._source, self._urgent, self._refused, self._left = source, urgent, refused, left
        self._parent = os.getppid()
        self._front = int(os.environ.get(FRONT_VARIABLE, "0"))
        self._signals, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # a signal's Python handler would have to wait until MLX returns; this byte does not
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl+c is for the front end
        threading.Thread(target=self._run, name="reader", daemon=True).start()

    def wake(self) -> None:
        """Put WAKE into `waiting`; from any thread."""
        self.waiting.put(WAKE)

    def _run(self) -> None:
        line, skipping = bytearray(), False
        while data := self._read():
            *ends, rest = data.split(b"\n")
            for end in ends:
                if not skipping:
                    self._take(bytes(line + end))
                line, skipping = bytearray(), False
            line += rest
            if len(line) > MAX_LINE_NBYTES:
                line, skipping = bytearray(), True
                self._refused(UsageError(f"a line has more than {MAX_LINE_NBYTES >> 20} MiB"), None)
        self._left()
        self.waiting.put(None)
        time.sleep(GRACE_SECONDS)
        os._exit(0)

    def _read(self) -> bytes:
        """The next bytes; none when nobody is left, or SIGTERM came."""
        while self._somebody_is_left():
            ready, _, _ = select.select([self._source, self._signals], [], [], PARENT_SECONDS)
            if self._signals in ready:
                return b""
            if self._source in ready:
                return os.read(self._source, READ_NBYTES)
        return b""

    def _somebody_is_left(self) -> bool:
        """A launcher that stands between front end and engine outlives the former."""
        if os.getppid() != self._parent:
            return False
        try:
            os.kill(self._front, 0)  # 0, of nobody, is this process's own group
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def _take(self, line: bytes) -> None:
        number = None
        try:
            message = decode(line)
            number = message["id"] if type(message.get("id")) is int else None
            request = Request.parse(message)
        except UsageError as error:
            self._refused(error, number)
            return
        if request.method in URGENT_METHODS:
            self._urgent(request)
        else:
            self.waiting.put(request)
