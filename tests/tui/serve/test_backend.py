"""The calls of a reply that reach the client: all, one, or those before a forced reply repeats itself."""

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from qchat.core.events import CallEvent, Done, Prefill, ToolUse
from qchat.tui.serve.backend import Backend, Completion
from qchat.tui.serve.engines import EngineSource
from tests.run_async import run_async


class ScriptedEngine:
    """A source, its client and its call in one: yields calls of `cities`, then `Done`."""

    model, ready = None, True

    def __init__(self, cities: str):
        uses = [ToolUse("look", {"city": city}, "", 1) for city in cities]
        self._events: list[CallEvent] = [Prefill(1, 1), *uses, Done("stop", tool_calls=tuple(uses))]
        self.cancelled = False

    async def client(self) -> "ScriptedEngine":
        return self

    def call(self, *_: object, **__: object) -> "ScriptedEngine":
        return self

    async def __aiter__(self) -> AsyncIterator[list[CallEvent]]:
        for event in self._events:
            yield [event]

    async def result(self) -> None: ...

    def cancel(self) -> None:
        self.cancelled = True


def reply(cities: str, **options: Any) -> tuple[list[str], Done]:
    """The cities of the calls that come out, and the end."""

    async def scenario() -> list[CallEvent]:
        backend = Backend(cast(EngineSource, ScriptedEngine(cities)))
        return [event async for event in backend.events(Completion(messages=[], **options), "me", "/")]

    *events, end = run_async(scenario())
    assert isinstance(end, Done)
    return [event.arguments["city"] for event in events if isinstance(event, ToolUse)], end


@pytest.mark.parametrize(
    ("options", "cities"),
    [
        ({}, "ABAC"),
        ({"parallel_calls": False}, "A"),
        ({"forced_call": "look"}, "AB"),
        ({"forced_call": ""}, "AB"),
        ({"forced_call": "look", "parallel_calls": False}, "A"),
    ],
)
def test_a_forced_reply_ends_before_it_repeats_a_call(options: dict[str, Any], cities: str):
    found, end = reply("ABAC", **options)
    assert "".join(found) == cities
    assert end.finish_reason == "stop"
    assert [call.arguments["city"] for call in end.tool_calls] == list(cities)
