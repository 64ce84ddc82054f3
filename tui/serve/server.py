"""The running server: its options, the socket it listens on, and uvicorn in front of the application."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import uvicorn

from ...core.errors import UsageError
from ..text.output import note, write
from .app import make_app
from .backend import Activity, Backend
from .defaults import HOST, PORT, url_of
from .engines import OwnEngine
from .guard import Guard, is_loopback

# a client's connection that asks nothing is closed; replies that run at the end may take so long
KEEP_ALIVE_SECONDS, SHUTDOWN_SECONDS = 75, 3


@dataclass(frozen=True)
class ServeOptions:
    """Where to listen, and whom to answer; `origins` are those of web pages, `names` further host names."""

    host: str = HOST
    port: int = PORT
    key: str | None = None
    insecure: bool = False
    origins: Sequence[str] = ()
    names: Sequence[str] = ()
    log_requests: bool = False

    def check(self) -> None:
        """Raise UsageError for an address that others reach, unless a key or `insecure` was given."""
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port is {self.port}, wanted 0 to 65535")
        if self.key is not None and not self.key.strip():
            raise UsageError("--api-key is empty")
        if not (is_loopback(self.host) or self.key or self.insecure):
            raise UsageError(
                f"others on the network reach {self.host}: give --api-key KEY, or --insecure to let all in"
            )


class Server:
    """One HTTP server in the running event loop; `url` is its address."""

    def __init__(self, backend: Backend, options: ServeOptions):
        """Bind the socket. Raises UsageError where that fails, or as `ServeOptions.check` does."""
        options.check()
        self.backend, self.options = backend, options
        self._socket = _bind(options.host, options.port)
        self.url = url_of(*self._socket.getsockname()[:2])
        guard = Guard(options.host, options.key, options.origins, options.names)
        app = make_app(backend, guard)
        if options.log_requests:
            _log_ends(backend)
        _silence_uvicorn()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        self._server = _QuietServer(config)

    @property
    def greeting(self) -> str:
        """A sentence that says what is served where."""
        key = " with the API key" if self.options.key else ""
        return f"{self.backend.model_name} answers at {self.url}/v1{key}; ctrl+c ends it"

    async def run(self) -> None:
        """Serve until `stop` is called."""
        with contextlib.closing(self._socket):
            await self._server.serve(sockets=[self._socket])

    def stop(self, *, at_once: bool = False) -> None:
        """End the server; cancel the replies that run, `at_once` without waiting for their clients."""
        self._server.should_exit, self._server.force_exit = True, at_once


class _QuietServer(uvicorn.Server):
    """Leaves signals to whoever runs the event loop."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        why = words.split(" (while")[0]  # asked for this address, which the sentence names
        raise UsageError(f"cannot listen on {host}, port {port}: {why}") from error


def _silence_uvicorn() -> None:
    """Keep its log, which quotes what clients sent, off the screen."""
    logger = logging.getLogger("uvicorn")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _log_ends(backend: Backend) -> None:
    """Note every request on stderr when it has ended: who, where, how much; never what was said."""
    count = backend.on_end

    def log(activity: Activity) -> None:
        count(activity)
        tokens = f"{activity.prompt_tokens:,} prompt tokens ({activity.cached_tokens:,} cached)"
        note(
            f"{activity.path} from {activity.client}: {activity.end}, {tokens}, "
            f"{activity.generated_tokens:,} generated"
        )

    backend.on_end = log


async def serve_until_interrupted(source: OwnEngine, server: Server) -> None:
    """Load the model, then serve until SIGINT or SIGTERM; a second one kills the engine.

    Raises QchatError where loading fails.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def interrupt() -> None:
        if stopped.is_set():
            source.kill()
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    waiting = asyncio.create_task(stopped.wait())
    try:
        loading = asyncio.create_task(source.client())
        await asyncio.wait({loading, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            write(sys.stderr, f"{server.greeting}\n")
            serving = asyncio.create_task(server.run())
            await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
            server.stop()
            await serving
    finally:
        waiting.cancel()
        await source.stop()
