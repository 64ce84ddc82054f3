"""The engine behind the server, which is started again when it dies."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from ...core.errors import QchatError
from ...core.worker.wire import LoadResult, ModelInfo
from ..chat.client import EngineClient


class EngineSource(Protocol):
    """Hands out the client of a living engine with a loaded model."""

    async def client(self) -> EngineClient:
        """Return the client. Raises RequestError (503) or QchatError if there is none."""
        ...

    @property
    def model(self) -> ModelInfo | None:
        """The loaded model."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a living engine has a loaded model."""
        ...


class OwnEngine:
    """An engine process for the server alone."""

    def __init__(self, factory: Callable[[], EngineClient], options: Mapping[str, Any]):
        """`options` are the parameters of `load`, the model among them."""
        self._factory, self._options = factory, options
        self._client: EngineClient | None = None
        self._model: ModelInfo | None = None
        self._loading: asyncio.Task[EngineClient] | None = None

    @property
    def model(self) -> ModelInfo | None:
        return self._model

    @property
    def ready(self) -> bool:
        return self._client is not None and self._client.alive

    @property
    def pid(self) -> int:
        """The engine's process id; 0 while there is none."""
        return self._client.pid if self._client else 0

    async def client(self) -> EngineClient:
        """Return the client; start an engine and load the model if there is none that lives.

        The engine goes on loading for the next request if this one is cancelled.
        """
        if self._client is not None and self._client.alive:
            return self._client
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load())
            self._loading.add_done_callback(_mark_retrieved)
        loading = self._loading
        await asyncio.wait({loading})  # which does not cancel it
        return loading.result()

    async def _load(self) -> EngineClient:
        client = self._factory()
        try:
            await client.start()
            loaded: LoadResult = await client.request("load", **self._options)
        except BaseException:
            client.kill()
            await client.stop()
            raise
        self._client, self._model = client, loaded.model
        return client

    async def stop(self) -> None:
        """End the engine after it has saved what it read last; end one that is still loading at once."""
        if self._loading is not None and not self._loading.done():
            self._loading.cancel()
            await asyncio.wait({self._loading})
        if self._client is not None:
            with suppress(QchatError):
                await self._client.request("save_state")
            await self._client.stop()

    def kill(self) -> None:
        """End the engine now, without saving."""
        if self._client is not None:
            self._client.kill()


def _mark_retrieved(loading: "asyncio.Task[EngineClient]") -> None:
    """Keep asyncio from complaining about a load whose failure nobody waits for."""
    if not loading.cancelled():
        loading.exception()
