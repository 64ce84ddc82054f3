"""The two threads between an engine and its pipes: one reads requests, one writes events at a limited rate.

Neither blocks the model or is blocked by it. Events that wait to be written are merged, so a slow front end
gets fewer, larger ones. The reader ends the process when the front end has exited.
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
from ..events import Memory, to_json
from .protocol import (
    FRONT_END_VARIABLE,
    MAX_LINE_NBYTES,
    URGENT_METHODS,
    Request,
    decode,
    encode,
    error_message,
)
from .wire import Result

LINES_PER_SECOND = 60
MEMORY_SECONDS = 0.25
# time for a running operation, such as a large matrix product, to finish
GRACE_SECONDS = 2.0
PARENT_SECONDS = 1.0
READ_NBYTES = 1 << 16
# an entry of the queue that is no request, but asks for idle work
WAKE = Request(0, "", {})
# of consecutive events of these kinds only the last matters
REPLACEABLE = ("load", "prefill", "progress", "memory")
JOINABLE = ("thought", "text")


class Outbox:
    """Writes lines to the file descriptor `output`; events at most `LINES_PER_SECOND` times a second."""

    def __init__(self, output: int, memory: Callable[[], Memory | None]):
        """Start the thread. During a call it sends what `memory` returns every `MEMORY_SECONDS`."""
        self._output, self._memory = output, memory
        self._change = threading.Condition()
        self._lines: list[bytes] = []
        self._events: list[dict[str, Any]] = []
        self._call: int | None = None
        self._closed = False
        self._flushed_at = self._memory_sent_at = 0.0
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def begin_call(self, call: int) -> None:
        """Assign the events that follow to `call`."""
        with self._change:
            self._call = call
            self._change.notify()

    def send_event(self, event: dict[str, Any]) -> None:
        """Queue an event of the current call."""
        with self._change:
            first = not self._events
            _append_or_merge(self._events, event)
            if first:
                self._change.notify()

    def end_call(self, call: int, result: Result | dict[str, Any] | QchatError) -> None:
        """Write the result or error of `call`, after its events."""
        failed = isinstance(result, QchatError)
        line = encode(error_message(result, call) if failed else {"id": call, "result": result})
        if len(line) > MAX_LINE_NBYTES:
            line = encode(error_message(UsageError("the result is too long for one line"), call))
        with self._change:
            if call == self._call:
                self._flush()
                self._call = None
            self._lines.append(line)
            self._change.notify()

    def send_message(self, message: Mapping[str, Any]) -> None:
        """Write a message that belongs to no call."""
        with self._change:
            self._lines.append(encode(message))
            self._change.notify()

    def close(self) -> None:
        """Write what is queued and stop, after at most `GRACE_SECONDS`."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(GRACE_SECONDS)

    def _run(self) -> None:
        with suppress(OSError):  # the front end has exited; the reader notices too
            while not self._closed or self._lines or self._events:
                self._write(self._wait_for_data())

    def _wait_for_data(self) -> bytes:
        """Wait for data and for the next time slot; return the data."""
        with self._change:
            self._change.wait_for(
                lambda: self._lines or self._events or self._closed,
                None if self._call is None else self._memory_sent_at + MEMORY_SECONDS - time.monotonic(),
            )
            self._change.wait_for(
                lambda: self._lines or self._closed,
                self._flushed_at + 1 / LINES_PER_SECOND - time.monotonic(),
            )
            self._add_memory_event()
            self._flush()
            lines, self._lines = self._lines, []
            return b"".join(lines)

    def _add_memory_event(self) -> None:
        now = time.monotonic()
        if self._call is not None and now - self._memory_sent_at >= MEMORY_SECONDS:
            self._memory_sent_at = now
            if memory := self._memory():
                _append_or_merge(self._events, to_json(memory))

    def _flush(self) -> None:
        if self._events:
            self._lines.append(encode({"id": self._call, "events": self._events}))
            self._events, self._flushed_at = [], time.monotonic()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._output, rest) :]


def _append_or_merge(events: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """Append `event`, or merge it into the last event if that is of the same kind and side."""
    last, kind = events[-1] if events else {}, event["event"]
    alike = last.get("event") == kind and last.get("side") == event.get("side")
    if not alike or kind not in REPLACEABLE + JOINABLE:
        events.append(event)
    elif kind in REPLACEABLE:
        events[-1] = event
    else:
        text, tokens = last["text"] + event["text"], last["tokens"] + event["tokens"]
        events[-1] = {**event, "text": text, "tokens": tokens}


class Inbox:
    """Reads requests from the file descriptor `source` into the queue `requests`; None marks the end and
    WAKE no request.

    Callbacks run on the reader's thread: `on_urgent` takes requests to serve at once; `on_invalid` takes the
    error of an invalid line and its call number, if any; `on_disconnect` runs when the front end has exited
    or on SIGTERM. The process exits `GRACE_SECONDS` after that in any case.
    """

    def __init__(
        self,
        source: int,
        on_urgent: Callable[[Request], None],
        on_invalid: Callable[[UsageError, int | None], None],
        on_disconnect: Callable[[], None],
    ):
        self.requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._source, self._on_urgent = source, on_urgent
        self._on_invalid, self._on_disconnect = on_invalid, on_disconnect
        self._parent = os.getppid()
        self._front_end = int(os.environ.get(FRONT_END_VARIABLE, "0"))
        self._signals, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # a Python signal handler would wait until MLX returns; the wakeup byte does not
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front end handles ctrl+c
        threading.Thread(target=self._run, name="reader", daemon=True).start()

    def wake(self) -> None:
        """Put WAKE into `requests`, from any thread."""
        self.requests.put(WAKE)

    def _run(self) -> None:
        line, skipping = bytearray(), False
        while data := self._read():
            *ends, rest = data.split(b"\n")
            for end in ends:
                if not skipping:
                    self._handle_line(bytes(line + end))
                line, skipping = bytearray(), False
            line += rest
            if len(line) > MAX_LINE_NBYTES:
                line, skipping = bytearray(), True
                self._on_invalid(UsageError(f"the line is longer than {MAX_LINE_NBYTES >> 20} MiB"), None)
        self._on_disconnect()
        self.requests.put(None)
        time.sleep(GRACE_SECONDS)
        os._exit(0)

    def _read(self) -> bytes:
        """Return the next bytes; none once the front end has exited or SIGTERM arrived."""
        while self._has_front_end():
            ready, _, _ = select.select([self._source, self._signals], [], [], PARENT_SECONDS)
            if self._signals in ready:
                return b""
            if self._source in ready:
                return os.read(self._source, READ_NBYTES)
        return b""

    def _has_front_end(self) -> bool:
        """Check parent and front end: a launcher between them may outlive the front end."""
        if os.getppid() != self._parent:
            return False
        try:
            os.kill(self._front_end, 0)  # 0, if unset, is this process's own group
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def _handle_line(self, line: bytes) -> None:
        number = None
        try:
            message = decode(line)
            number = message["id"] if type(message.get("id")) is int else None
            request = Request.parse(message)
        except UsageError as error:
            self._on_invalid(error, number)
            return
        if request.method in URGENT_METHODS:
            self._on_urgent(request)
        else:
            self.requests.put(request)
