"""One endpoint that replies: reads a request, has it answered, writes the answer whole or as a stream.

A dialect says how requests and answers are written. Errors before the first event are statuses; later ones
are events of the stream. A client that leaves cancels its reply.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ...core.events import CallEvent, Done, Logprobs, Notice, Prefill
from .backend import Backend, Completion
from .bodies import ignored_header, read_object
from .errors import ClientGone, RequestError

STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
# how long a client may take to receive one part of a stream
SEND_SECONDS = 30.0
Result = TypeVar("Result")


class Answer(Protocol):
    """The answer to one request; `begin`, `add` and `end` return the parts of a stream."""

    def begin(self, prompt: Prefill) -> Iterable[bytes]:
        """Return what comes before the reply; `prompt` has its tokens, and how many were cached."""
        ...

    def add(self, event: CallEvent) -> Iterable[bytes]:
        """Return what an event of the reply adds."""
        ...

    def end(self, done: Done) -> Iterable[bytes]:
        """Return the end."""
        ...

    def fail(self, error: RequestError) -> Iterable[bytes]:
        """Return the end of a stream that breaks off."""
        ...

    def whole(self, done: Done, logprobs: list[Logprobs]) -> dict[str, Any]:
        """Return the answer that is no stream."""
        ...


@dataclass(frozen=True)
class Parsed:
    """A request as read: what to ask the engine, how to answer, and what was ignored.

    `client` is a name by which the client distinguishes users or conversations, if it gave one.
    """

    completion: Completion
    answer: Answer
    streams: bool
    ignored: list[str]
    client: str = ""


class Dialect(Protocol):
    """How requests and errors are written."""

    def read(self, body: dict[str, Any], backend: Backend) -> Parsed:
        """Parse a body. Raises RequestError."""
        ...

    def error(self, error: RequestError) -> dict[str, Any]:
        """Return the body of an error."""
        ...


class Endpoint:
    """The ASGI application of one path."""

    def __init__(self, backend: Backend, dialect: Dialect):
        self._backend, self._dialect = backend, dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            parsed = self._dialect.read(await read_object(request), self._backend)
            await until_gone(receive, self._answer(request, parsed, send))
        except ClientGone:
            pass
        except RequestError as error:
            await error_response(self._dialect.error(error), error)(scope, receive, send)

    async def _answer(self, request: Request, parsed: Parsed, send: Send) -> None:
        client, path = client_name(request, parsed.client), request.url.path
        headers = ignored_header(parsed.ignored)
        async with aclosing(self._backend.events(parsed.completion, client, path)) as events:
            if parsed.streams:
                await _stream(events, parsed.answer, headers, send)
            else:
                await _reply_whole(events, parsed.answer, headers, request, send)


async def _reply_whole(
    events: AsyncGenerator[CallEvent],
    answer: Answer,
    headers: Mapping[str, str],
    request: Request,
    send: Send,
) -> None:
    logprobs: list[Logprobs] = []
    done = None
    async for event in events:
        match event:
            case Logprobs():
                logprobs.append(event)
            case Done():
                done = _checked(event)
            case Prefill():
                answer.begin(event)
    if done is None:
        raise RequestError(500, "the reply ended without its closing event")
    response = JSONResponse(answer.whole(done, logprobs), headers=dict(headers))
    await response(request.scope, request.receive, send)


async def _stream(
    events: AsyncGenerator[CallEvent], answer: Answer, headers: Mapping[str, str], send: Send
) -> None:
    first = await anext(events)
    prompt = first if isinstance(first, Prefill) else Prefill(0, 0)
    given = {**STREAM_HEADERS, **headers}
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
        }
    )

    async def write(parts: Iterable[bytes], *, more: bool = True) -> None:
        body = b"".join(parts)
        if body or not more:
            await _send_in_time(send, {"type": "http.response.body", "body": body, "more_body": more})

    await write(answer.begin(prompt))
    try:
        async for event in _after(first, events):
            match event:
                case Done():
                    await write(answer.end(_checked(event)))
                case Prefill():
                    await write([b": reading the prompt, %d of %d\n\n" % (event.done, event.total)])
                case Notice():
                    pass
                case _:
                    await write(answer.add(event))
    except RequestError as error:
        await write(answer.fail(error))
    await write([], more=False)


async def _send_in_time(send: Send, message: Message) -> None:
    """Send a message. Raises ClientGone if the client does not read."""
    try:
        await asyncio.wait_for(send(message), SEND_SECONDS)
    except TimeoutError as error:
        raise ClientGone from error


async def _after(first: CallEvent, events: AsyncGenerator[CallEvent]) -> AsyncGenerator[CallEvent]:
    """Yield the events after the `first`, itself included if it is the only one."""
    if isinstance(first, Done):
        yield first
    async for event in events:
        yield event


def _checked(done: Done) -> Done:
    """Return the end of a complete reply. Raises RequestError for one that failed or was stopped."""
    if done.finish_reason == "cancelled" and done.detail:  # the memory guard stopped it
        raise RequestError(503, done.detail, "out_of_memory")
    if done.finish_reason == "error":
        raise RequestError(500, done.detail or "the reply failed", "generation_failed")
    return done


async def until_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to its end, or cancel it when the client leaves. Raises ClientGone then."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def client_name(request: Request, hint: str) -> str:
    """Return what distinguishes a client from others: address, program, and the name that it gives."""
    address = request.client.host if request.client else ""
    return f"{address} {request.headers.get('user-agent', '')[:80]} {hint[:80]}".strip()


def error_response(body: Mapping[str, Any], error: RequestError) -> Response:
    """Return the response to a request that failed; `body` tells the error in its dialect."""
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def sse(data: object, event: str | None = None) -> bytes:
    """Return one event of a stream."""
    name = f"event: {event}\n" if event else ""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"{name}data: {text}\n\n".encode()
