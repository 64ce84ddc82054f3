"""A queue in which clients take turns: the engine replies to one request at a time.

Refuses more requests than can wait.
"""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .defaults import MAX_WAITING
from .errors import RequestError

# weight of the newest request in the mean time of one, and the longest time to wait that is suggested
SHARE, MAX_RETRY_SECONDS = 0.2, 60


class FairQueue:
    """Lets one request at a time in; among those that wait, the next is of another client."""

    def __init__(self, max_waiting: int = MAX_WAITING):
        self.max_waiting = max_waiting
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._busy = False
        self._seconds = 1.0  # that a request takes on average

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn of `client` and hold it. Raises RequestError (429) if too many wait already."""
        await self._enter(client)
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds += SHARE * (time.monotonic() - begin - self._seconds)
            self._let_next()

    async def _enter(self, client: str) -> None:
        if not self._busy:
            self._busy = True
            return
        if self.waiting >= self.max_waiting:
            seconds = min(math.ceil(self._seconds * self.waiting) or 1, MAX_RETRY_SECONDS)
            raise RequestError(
                429,
                f"{self.waiting} requests wait already: try again in {seconds} s",
                "rate_limit_exceeded",
                headers={"retry-after": str(seconds)},
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # its turn came at the same moment
                self._let_next()
            else:
                self._drop(client, place)
            raise

    def _drop(self, client: str, place: asyncio.Future[None]) -> None:
        """Remove a place, unless `_let_next` has passed over it already."""
        places = self._waiting.get(client, deque())
        if place in places:
            places.remove(place)
        if not places:
            self._waiting.pop(client, None)

    def _let_next(self) -> None:
        """Give the turn to the next request that still waits; a cancelled one may not have left yet."""
        while self._waiting:
            client, places = self._waiting.popitem(last=False)
            place = places.popleft()
            if places:
                self._waiting[client] = places
            if not place.done():
                place.set_result(None)
                return
        self._busy = False
