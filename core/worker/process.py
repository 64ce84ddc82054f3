"""The engine process: `python -m qchat.core.worker` serves one conversation, and jobs, over its pipes.

Speaks `protocol.py`. The main thread computes; the threads of `channel.py` read and write. The process
reports ready before it imports MLX. A failed request ends in an error and never ends the process. If
`mlx.launch` starts several processes, the first one serves and the others follow it.
"""

import ctypes
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..engine.launcher import follows
from ..errors import DoesNotFit, GenerationError, QchatError, UsageError
from ..events import Announcement, Background, LogLine, Ready, to_json
from ..machine.subnormals import flush_process
from ..quoting import printable
from .channel import WAKE, Inbox, Outbox
from .protocol import PROTOCOL_VERSION, Request, error_message
from .wire import Empty

if TYPE_CHECKING:
    from .methods import EngineMethods
    from .wire import Result

PR_SET_PDEATHSIG = 1
# how long nobody asks for anything before what was read is saved
REST_SECONDS = 20.0
DONE = object()


class Worker:
    """The loop that serves requests, and the callbacks that cancel them."""

    def __init__(self, source: int, output: int):
        """Read requests from the file descriptor `source` and write lines to `output`."""
        self._source = source
        self._methods: EngineMethods | None = None
        self._lock = threading.Lock()
        self._current: int | None = None
        self._to_cancel: set[int] = set()
        self._disconnected = False
        self._background = ""
        self._outbox = Outbox(output, lambda: self._methods.memory() if self._methods else None)

    def serve(self) -> None:
        """Serve requests until `shutdown` or the end of the input.

        Raises ImportError for an incomplete installation, GenerationError if other ranks do not connect.
        """
        self._announce(Ready(PROTOCOL_VERSION, os.getpid()))
        inbox = Inbox(self._source, self._serve_urgent, self._report_invalid, self._disconnect)
        from ..engine.followers import stop_followers
        from ..engine.ranks import join_ranks
        from .methods import EngineMethods

        join_ranks()  # the other ranks are waiting
        self._methods = methods = EngineMethods(
            self._outbox.send_event,
            self._is_cancelled,
            background=self._report_background,
            wake=inbox.wake,
        )
        methods.guard.start()
        method = ""
        while method != "shutdown":
            self._run_idle_work(methods, inbox)
            request = self._wait(methods, inbox)
            if request is None:
                break
            if request is WAKE:
                continue
            self._outbox.begin_call(request.id)
            self._outbox.end_call(request.id, self._call(methods, request))
            method = request.method
        methods.close()
        stop_followers()
        self._outbox.close()

    def _announce(self, event: Announcement) -> None:
        self._outbox.send_message(to_json(event))

    # on the reader's thread

    def _serve_urgent(self, request: Request) -> None:
        if request.method == "cancel":
            self._cancel(request.params["id"])
        elif self._methods is not None:
            self._methods.close_thought()
        self._outbox.end_call(request.id, Empty())

    def _report_invalid(self, error: UsageError, call: int | None) -> None:
        self._outbox.send_message(error_message(error, call))

    def _cancel(self, call: int) -> None:
        with self._lock:
            self._to_cancel.add(call)
            if self._current == call and self._methods is not None:
                self._methods.cancel()

    def _disconnect(self) -> None:
        self._disconnected = True
        if self._methods is not None:
            self._methods.cancel()

    # the loop

    def _report_background(self, text: str) -> None:
        if text != self._background:
            self._background = text
            self._announce(Background(text))

    def _is_cancelled(self) -> bool:
        return self._disconnected or self._current in self._to_cancel

    def _run_idle_work(self, methods: "EngineMethods", inbox: Inbox) -> None:
        """Prepare for the next request until it arrives."""
        with self._optional(), closing(methods.idle_work()) as work:
            while inbox.requests.empty():
                if next(work, DONE) is DONE:
                    return

    def _wait(self, methods: "EngineMethods", inbox: Inbox) -> "Request | Any | None":
        """Return the next entry of the queue; after a rest, save meanwhile what was read."""
        with suppress(queue.Empty):
            return inbox.requests.get(timeout=REST_SECONDS)
        with self._optional():
            methods.save_when_idle()
        return inbox.requests.get()

    @contextmanager
    def _optional(self) -> Iterator[None]:
        """Log what fails in the block: it must not end the process."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            self._announce(LogLine(f"idle work failed: {text}"))

    def _call(self, methods: "EngineMethods", request: Request) -> "Result | dict[str, Any] | QchatError":
        with self._lock:
            self._current = request.id
        try:
            return methods.call(request.method, request.params)
        except QchatError as error:
            return error
        except MemoryError:
            return DoesNotFit(f"{request.method} ran out of memory")
        except OSError as error:  # a disk that fails, a name that no file can have
            name = "" if error.filename is None else f": {printable(str(error.filename))}"
            return GenerationError(f"{request.method} failed: {error.strerror or error}{name}")
        except RuntimeError as error:  # from MLX
            return GenerationError(f"{request.method} failed: {' '.join(str(error).split())}")
        except Exception as error:  # one faulty request must not end the process
            traceback.print_exc()
            return GenerationError(
                f"{request.method} failed with an internal error ({type(error).__name__}): see the log"
            )
        finally:
            with self._lock:
                self._to_cancel.discard(request.id)
                self._current = None


def wake_on_parent_exit() -> None:
    """Have Linux continue this process, if it is stopped, when its parent exits; `Inbox` then ends it.

    A stopped process (ctrl+z, a debugger) runs no thread that could notice. SIGCONT and not SIGKILL: to the
    kernel the parent is the thread that started the engine, which may end long before the front end.
    macOS has no such request: an engine that is stopped there ends when it is continued.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without prctl
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)


def main() -> None:
    """Serve on stdin and stdout; redirect what libraries print on stdout to stderr."""
    wake_on_parent_exit()
    output = os.dup(1)
    os.dup2(2, 1)
    if follows():
        from ..engine.followers import follow as serve
    else:
        serve = Worker(0, output).serve
    try:
        flush_process()  # before MLX's threads exist: they inherit it
        serve()
    except QchatError as error:  # the front end logs stderr
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    sys.stderr.flush()
    os._exit(0)  # skip the teardown: the system frees the memory anyway
