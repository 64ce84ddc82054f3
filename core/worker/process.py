"""The engine process: `python -m qchat.core.worker` serves one conversation, and jobs, over its pipes.

Speaks `protocol.py`. This thread alone computes; `pipes.py` has the two that read and write. It is ready
before MLX is imported. A request that fails ends in an error, never in the end of the process. Of several
that `mlx.launch` starts, the first one serves and the others follow it.
"""

import os
import sys
import threading
import traceback
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ..engine.launcher import follows
from ..errors import DoesNotFit, GenerationError, QchatError, UsageError
from ..machine.subnormals import flush_process
from .channel import WAKE, Inbox, Outbox
from .protocol import PROTOCOL_VERSION, Request, error_message

if TYPE_CHECKING:
    from .methods import Desk


class Worker:
    """The loop, and what is told and cancelled while a request is served."""

    def __init__(self, source: int, output: int):
        """Requests come from the file descriptor `source`, lines go to `output`."""
        self._source = source
        self._desk: Desk | None = None
        self._lock = threading.Lock()
        self._current: int | None = None
        self._to_cancel: set[int] = set()
        self._left = False
        self._background = ""
        self._outbox = Outbox(output, lambda: self._desk.figures() if self._desk else None)

    def serve(self) -> None:
        """Answer requests until there are no more. Raises ImportError where the runtime is not whole, and
        GenerationError where other ranks do not come."""
        self._outbox.say({"event": "ready", "protocol": PROTOCOL_VERSION, "pid": os.getpid()})
        inbox = Inbox(self._source, self._urgent, self._refused, self._leave)
        from ..engine.followers import stop_followers
        from ..engine.ranks import join_ranks
        from .methods import Desk

        join_ranks()  # the other ranks wait for it
        self._desk = desk = Desk(
            self._outbox.event, self._cancelled, background=self._tell_background, wake=inbox.wake
        )
        method = ""
        while method != "shutdown":
            self._use_spare_time(desk, inbox)
            request = inbox.waiting.get()
            if request is None:
                break
            if request is WAKE:
                continue
            self._outbox.begin(request.id)
            self._outbox.end(request.id, self._answer(desk, request))
            method = request.method
        desk.close()
        stop_followers()
        self._outbox.close()

    # on the reader's thread

    def _urgent(self, request: Request) -> None:
        if request.method == "cancel":
            self._cancel(request.params["id"])
        elif self._desk is not None:
            self._desk.close_thought()
        self._outbox.end(request.id, {})

    def _refused(self, error: UsageError, call: int | None) -> None:
        self._outbox.say(error_message(error, call))

    def _cancel(self, call: int) -> None:
        with self._lock:
            self._to_cancel.add(call)
            if self._current == call and self._desk is not None:
                self._desk.cancel()

    def _leave(self) -> None:
        self._left = True
        if self._desk is not None:
            self._desk.cancel()

    # the loop

    def _tell_background(self, text: str) -> None:
        if text != self._background:
            self._background = text
            self._outbox.say({"event": "background", "text": text})

    def _cancelled(self) -> bool:
        return self._left or self._current in self._to_cancel

    def _use_spare_time(self, desk: "Desk", inbox: Inbox) -> None:
        """Make ready what the next request will need, until it comes."""
        try:
            with closing(desk.spare_work()) as work:
                while inbox.waiting.empty():
                    next(work)
        except StopIteration:
            pass
        except Exception as error:  # nobody asked for it, so it must not end the process
            text = " ".join(str(error).split()) or type(error).__name__
            self._outbox.say({"event": "log", "text": f"reading ahead failed: {text}"})

    def _answer(self, desk: "Desk", request: Request) -> dict[str, Any] | QchatError:
        with self._lock:
            self._current = request.id
        try:
            return desk.do(request.method, request.params)
        except QchatError as error:
            return error
        except MemoryError:
            return DoesNotFit(f"{request.method}: the machine ran out of memory")
        except RuntimeError as error:  # what MLX raises
            return GenerationError(f"{request.method} failed: {' '.join(str(error).split())}")
        except Exception as error:  # one faulty request must not end the process
            traceback.print_exc()
            return GenerationError(
                f"{request.method}: an internal error ({type(error).__name__}); see the log"
            )
        finally:
            with self._lock:
                self._to_cancel.discard(request.id)
                self._current = None


def main() -> None:
    """Serve this process's stdin and stdout; what libraries print there goes to stderr instead."""
    output = os.dup(1)
    os.dup2(2, 1)
    if follows():
        from ..engine.followers import follow as serve
    else:
        serve = Worker(0, output).serve
    try:
        flush_process()  # before MLX's threads exist: they inherit it
        serve()
    except QchatError as error:  # the front end will find it in the log
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    sys.stderr.flush()
    os._exit(0)  # at once, without taking gigabytes apart that the system frees anyway
