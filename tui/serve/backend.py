"""From a parsed request to the engine's events: queued fairly, and cancelled when nobody reads them.

Knows no HTTP.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ...core.errors import QchatError
from ...core.events import CallEvent, Done, Memory, Prefill, Text, Thought, ToolUse
from ..chat.client import Call
from .defaults import MAX_WAITING
from .engines import EngineSource
from .errors import RequestError, as_request_error
from .fair_queue import FairQueue

# the longest reply where neither request nor settings say: as long as the context
UNLIMITED = 1 << 22


@dataclass(frozen=True)
class Completion:
    """What the engine is asked: messages or a raw prompt, tools, and the settings of the reply.

    `forced_call` names a tool that must be called; empty means any. The arguments of `strict_tools` satisfy
    their schemas. `constraint` is the form that the answer must have, as the client wrote it:
    `{"type": "json_object"}` or `{"type": "json_schema", "schema": ...}`. Without `parallel_calls` the reply
    ends with its first call.
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    tools: list[dict[str, Any]] | None = None
    forced_call: str | None = None
    strict_tools: list[str] = field(default_factory=list)
    constraint: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    parallel_calls: bool = True

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of the engine's method `complete`."""
        return dict(vars(self))


@dataclass
class Activity:
    """A request under way, for status rows and metrics; times are those of `time.monotonic`."""

    client: str
    path: str
    begun: float
    running: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token: float | None = None
    done: Done | None = None
    end: str = "unfinished"  # a finish reason, the status of an error, or `counted`
    ended: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """The speed of decoding so far."""
        seconds = time.monotonic() - (self.first_token or time.monotonic())
        return self.generated_tokens / seconds if seconds > 0 else 0.0

    def follow(self, event: CallEvent) -> None:
        """Learn from an event of the reply."""
        match event:
            case Prefill():
                self.prompt_tokens, self.cached_tokens = event.total, event.cached
            case Thought() | Text() | ToolUse():
                self.first_token = self.first_token or time.monotonic()
                self.generated_tokens += event.tokens
            case Done():
                self.done, self.end = event, event.finish_reason


class Backend:
    """The engine as HTTP handlers see it.

    `on_begin` is called when a request arrives, `on_end` when it ends. `activities` are the requests under
    way by number. `memory` is what the engine reported last.
    """

    def __init__(
        self,
        source: EngineSource,
        *,
        settings: Mapping[str, Any] | None = None,
        max_waiting: int = MAX_WAITING,
    ):
        """`settings` are those of replies to requests that give none."""
        self.source, self.queue = source, FairQueue(max_waiting)
        self.settings = {"max_new_tokens": UNLIMITED, **(settings or {})}
        self.activities: dict[int, Activity] = {}
        self.on_begin: Callable[[Activity], None] = lambda _: None
        self.on_end: Callable[[Activity], None] = lambda _: None
        self.memory: Memory | None = None
        self._numbers = count(1)

    async def events(self, completion: Completion, client: str, path: str) -> AsyncGenerator[CallEvent]:
        """Yield the reply's events from its first `Prefill` on; the last is `Done`.

        Closing the generator cancels the reply. Raises RequestError.
        """
        async with self._activity(client, path) as activity, self.queue.turn(client):
            activity.running = True
            async with (
                self._call("complete", completion.parameters()) as call,
                aclosing(self._follow(call, activity)) as events,
            ):
                async for event in events:
                    yield event

    async def count(self, completion: Completion, client: str, path: str) -> int:
        """Return the number of tokens of the request's prompt. Raises RequestError."""
        wanted = {name: completion.parameters()[name] for name in ("messages", "tools", "settings")}
        async with (
            self._activity(client, path) as activity,
            self.queue.turn(client),
            self._call("count_messages", wanted) as call,
        ):
            tokens = (await call.result()).tokens
            activity.end = "counted"
            return tokens

    @property
    def model_name(self) -> str:
        """The name of the loaded model."""
        return self.source.model.name if self.source.model else "none"

    @asynccontextmanager
    async def _activity(self, client: str, path: str) -> AsyncIterator[Activity]:
        number, activity = next(self._numbers), Activity(client, path, time.monotonic())
        self.activities[number] = activity
        self.on_begin(activity)
        try:
            yield activity
        except RequestError as error:
            activity.end = str(error.status)
            raise
        finally:
            del self.activities[number]
            activity.ended = time.monotonic()
            self.on_end(activity)

    @asynccontextmanager
    async def _call(self, method: str, parameters: dict[str, Any]) -> AsyncIterator[Call]:
        """Call the engine; at the end, however that comes, the engine is free again."""
        call = None
        try:
            client = await self.source.client()
            call = client.call(method, **parameters)
            yield call
            await call.result()
        except QchatError as error:
            raise as_request_error(error) from error
        except RecursionError as error:
            raise RequestError(400, "the request nests too deeply") from error
        finally:
            if call is not None:
                await _finish(call)

    async def _follow(self, call: Call, activity: Activity) -> AsyncGenerator[CallEvent]:
        began = False
        async for batch in call:
            for event in batch:
                if isinstance(event, Memory):
                    self.memory = event
                    continue
                activity.follow(event)
                began = began or isinstance(event, Prefill | Done)
                if began:
                    yield event


async def _finish(call: Call) -> None:
    """Cancel the call unless it has ended, and wait for its end."""
    with suppress(QchatError):
        call.cancel()
        await call.result()
