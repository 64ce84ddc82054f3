"""The event loop of a test: one each, with a limit, so that what never happens fails instead of hanging."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_async(coroutine: Coroutine[Any, Any, T], seconds: float = 60) -> T:
    """Run `coroutine` on an event loop of its own; raise TimeoutError if it takes longer than `seconds`."""

    async def limited() -> T:
        async with asyncio.timeout(seconds):
            return await coroutine

    return asyncio.run(limited())
