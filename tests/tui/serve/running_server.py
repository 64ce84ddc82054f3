"""A server on loopback with an engine process of its own, in a thread: what tests talk to as clients do."""

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import anthropic
import httpx2
import openai

from qchat.core.hub.catalog import BUILT_IN_MODEL
from qchat.tui.chat.client import EngineClient
from qchat.tui.serve.backend import Backend
from qchat.tui.serve.engines import OwnEngine
from qchat.tui.serve.server import ServeOptions, Server
from tests.run_async import run_async

# an engine whose model calls the tool `weather`
CALLING = (sys.executable, "-P", str(Path(__file__).with_name("calling_model.py")))
SECONDS, LIFETIME = 600.0, 86400.0
KEY = "secret"
WEATHER_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
Result = TypeVar("Result")


class RunningServer:
    """Serves until the `with` block ends; `backend` and `source` belong to its event loop."""

    def __init__(
        self,
        factory: Callable[[], EngineClient] = EngineClient,
        *,
        model: Path = BUILT_IN_MODEL,
        context_limit: int | None = None,
        store: Path | None = None,
        max_waiting: int = 64,
        options: ServeOptions | None = None,
        settings: dict[str, Any] | None = None,
        snapshot_budget: int | None = None,
    ):
        loading = {
            "model": str(model),
            "context_limit": context_limit,
            "store": store and str(store),
            "snapshot_budget": snapshot_budget,
        }
        self.source = OwnEngine(factory, loading)
        self.backend = Backend(self.source, settings=settings, max_waiting=max_waiting)
        self._options = options or ServeOptions(port=0)
        self._ready: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: run_async(self._serve(), LIFETIME), daemon=True)
        self.url = ""

    def __enter__(self) -> "RunningServer":
        self._thread.start()
        self.url = self._ready.result(SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._server.stop)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the server does not stop"

    async def _serve(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
            await self.source.client()
            self._server = Server(self.backend, self._options)
            self._ready.set_result(self._server.url)
            await self._server.run()
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            raise
        finally:
            await self.source.stop()

    def on_loop(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(SECONDS)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await asyncio.sleep(0.005)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for a state of the server; `holds` runs on its event loop."""
        self.on_loop(self._until(holds))

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, **options)

    def anthropic(self, **options: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key=KEY, max_retries=0, **options)

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=SECONDS, **options)
