"""An endpoint by itself: replies that were stopped, and clients that stop reading."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from starlette.types import Message

from qchat.core.events import CallEvent, Done, Prefill, Text
from qchat.tui.serve import endpoint
from qchat.tui.serve.backend import Backend, Completion
from qchat.tui.serve.endpoint import Endpoint
from qchat.tui.serve.openai_input import error_body
from tests.run_async import run_async

STOPPED = "the reply was stopped: memory is full"


class Answer:
    def begin(self, prompt: Prefill) -> list[bytes]:
        del prompt
        return [b"begin "]

    def add(self, event: CallEvent) -> list[bytes]:
        del event
        return [b"text "]

    def end(self, done: Done) -> list[bytes]:
        del done
        return [b"end"]

    def fail(self, error: endpoint.RequestError) -> list[bytes]:
        return [f"{error.code}: {error}".encode()]

    def whole(self, done: Done, logprobs: list[Any]) -> dict[str, Any]:
        del done, logprobs
        return {"complete": True}


class Dialect:
    error = staticmethod(error_body)

    def read(self, body: dict[str, Any], backend: Backend) -> endpoint.Parsed:
        del backend
        return endpoint.Parsed(Completion(), Answer(), body["stream"], [])


class Scripted:
    """A backend whose reply is a list of events; `closed` tells that the engine is free again."""

    def __init__(self, *events: CallEvent):
        self._events, self.closed = events, False

    async def events(self, *_: object) -> AsyncGenerator[CallEvent]:
        try:
            for event in self._events:
                yield event
        finally:
            self.closed = True


async def ask(backend: Scripted, body: bytes, send: Any) -> None:
    received = iter([{"type": "http.request", "body": body}])

    async def receive() -> Message:
        for message in received:
            return message
        await asyncio.Event().wait()  # the client stays connected
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    await Endpoint(cast(Backend, backend), Dialect())(scope, receive, send)


def answer_to(backend: Scripted, body: bytes) -> tuple[int, str]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    run_async(ask(backend, body, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


def stopped() -> Scripted:
    return Scripted(Prefill(1, 1), Text("a"), Done("cancelled", "a", detail=STOPPED))


def test_a_reply_that_the_memory_guard_stopped_is_an_error():
    status, text = answer_to(stopped(), b'{"stream": false}')
    assert status == 503
    assert STOPPED in text
    assert "out_of_memory" in text


def test_a_stream_that_the_memory_guard_stopped_ends_with_an_error():
    status, text = answer_to(stopped(), b'{"stream": true}')
    assert status == 200
    assert text == f"begin text out_of_memory: {STOPPED}"


@pytest.mark.parametrize(
    "body", [rb'{"stream": false, "model": "\ud800"}', rb'{"stream": false, "\udfff": 1}']
)
def test_half_a_surrogate_pair_is_a_bad_request(body: bytes):
    status, text = answer_to(Scripted(), body)
    assert status == 400
    assert "not JSON" in text


def test_a_client_that_stops_reading_frees_the_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "SEND_SECONDS", 0.01)
    backend = Scripted(Prefill(1, 1), Text("a"), Text("b"))

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    run_async(ask(backend, b'{"stream": true}', send))
    assert backend.closed
