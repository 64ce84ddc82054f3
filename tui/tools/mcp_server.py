"""One running server of the Model Context Protocol, by the official SDK.

Owns the connection, its time limits, and a sentence for each of its failures. The SDK is imported when a
server starts. Refuses more tools, and longer descriptions, than a context should hold.
"""

import asyncio
import json
import logging
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ...core.errors import UsageError
from .base import Tool, ToolError, one_line
from .server_specs import ServerSpec, is_loopback

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

MISSING = "servers of tools need the packages of their extra: pip install 'qchat[tools]'"
START_SECONDS, CALL_SECONDS, STOP_SECONDS = 20.0, 120.0, 8.0
MAX_TOOLS = 128
MAX_PAGES = 16
MAX_EVENT_NBYTES = 8 << 20  # of one message over HTTP; results are cut afterwards
MAX_DESCRIPTION, MAX_SCHEMA = 2000, 50_000  # characters
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
State = Literal["off", "starting", "on", "failed"]


def require_sdk() -> None:
    """Raise UsageError where the extra `tools` is not installed."""
    from importlib.util import find_spec

    if find_spec("mcp") is None:
        raise UsageError(MISSING)


def has_sdk() -> bool:
    """Whether the extra `tools` is installed."""
    try:
        require_sdk()
    except UsageError:
        return False
    return True


class McpServer:
    """A server that can be started and stopped; `problem` says why it failed, or what of it is left out.

    A server that ended keeps its tools, so that the model's prompt stays the same; calls of them fail.
    """

    def __init__(self, spec: ServerSpec):
        self.spec = spec
        self.state: State = "off"
        self._problem = ""
        self.tools: list[Tool] = []
        self._task: asyncio.Task[None] | None = None
        self._client: Client | None = None
        self._settled, self._stopping = asyncio.Event(), asyncio.Event()
        self._said: deque[str] = deque(maxlen=5)  # the last lines on its stderr

    @property
    def problem(self) -> str:
        """The sentence about what went wrong, with the last words of a program that failed."""
        last = f" ({one_line(self._said[-1], 200)})" if self._said and self.state == "failed" else ""
        return f"{self._problem}{last}"

    def start(self) -> None:
        """Begin to start the server, unless it runs."""
        if self.state in ("starting", "on"):
            return
        self.state, self._problem = "starting", ""
        self._settled = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._serve(self._task, self._settled))

    async def settled(self) -> None:
        """Wait until a starting server runs or failed."""
        if self.state == "starting":
            await self._settled.wait()

    async def stop(self) -> None:
        """End the connection, and the program behind it."""
        task, self._task = self._task, None
        self._stopping.set()
        if task is not None:
            if self.state == "starting":
                task.cancel()
            _, late = await asyncio.wait([task], timeout=STOP_SECONDS)
            for one in late:
                one.cancel()
            if late:
                await asyncio.wait(late)
        self.state, self.tools = "off", []

    async def _serve(self, before: "asyncio.Task[None] | None", settled: asyncio.Event) -> None:
        """Hold the connection until it is to end; the SDK wants it closed by the task that opened it."""
        if before is not None:  # an earlier connection that is being cleared away
            await asyncio.wait([before])
        self._stopping.clear()
        self._said.clear()
        try:
            require_sdk()
            async with asyncio.timeout(START_SECONDS) as limit, self._connected() as client:
                found = await self._list_tools(client)
                limit.reschedule(None)
                self._client, self.tools, self.state = client, found, "on"
                settled.set()
                await self._stopping.wait()
        except TimeoutError:
            self._fail(f"it did not answer within {START_SECONDS:.0f} s")
        except UsageError as error:
            self._fail(str(error))
        except Exception as error:  # other people's programs and the SDK raise what they like
            self._fail(explain(error))
        finally:
            self._client = None
            settled.set()

    def _end(self, why: str) -> None:
        """Note that the connection has ended, so that it is cleared away."""
        self._fail(why)
        self._client = None
        self._stopping.set()

    def _fail(self, why: str) -> None:
        if not self._stopping.is_set():  # else it was to end anyway
            self.state, self._problem = "failed", why

    @asynccontextmanager
    async def _connected(self) -> "AsyncIterator[Client]":
        from mcp import Client

        silence_sdk()
        async with self._transport() as transport, Client(transport, cache=None) as client:
            yield client

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        """Make the SDK's transport: a program with its stderr kept, or an address without proxies."""
        from mcp import StdioServerParameters, stdio_client

        spec = self.spec
        if spec.command:
            program, *arguments = spec.command
            parameters = StdioServerParameters(command=program, args=arguments, env=dict(spec.env))
            async with self._stderr() as errors:
                yield stdio_client(parameters, errlog=errors)
            return
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        direct = is_loopback(urlsplit(spec.url).hostname or "")
        timeout = httpx2.Timeout(START_SECONDS, read=CALL_SECONDS)
        async with httpx2.AsyncClient(
            headers=dict(spec.headers), timeout=timeout, trust_env=not direct
        ) as web:
            yield streamable_http_client(spec.url, http_client=web, max_sse_event_size=MAX_EVENT_NBYTES)

    @asynccontextmanager
    async def _stderr(self) -> AsyncIterator[Any]:
        """Keep the last lines that the program writes to its stderr; they explain how it ended."""
        reading, writing = os.pipe()
        loop, lines = asyncio.get_running_loop(), asyncio.StreamReader(limit=1 << 16)
        with os.fdopen(reading, "rb", 0) as source, os.fdopen(writing, "w") as errors:
            pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), source)
            keeping = loop.create_task(self._keep_lines(lines))
            try:
                yield errors
            finally:
                keeping.cancel()
                with suppress(asyncio.CancelledError):
                    await keeping
                pipe.close()

    async def _keep_lines(self, lines: asyncio.StreamReader) -> None:
        while chunk := await lines.read(1 << 14):
            text = chunk.decode(errors="replace")
            self._said.extend(line for line in text.splitlines() if line.strip())

    # tools

    async def _list_tools(self, client: "Client") -> list[Tool]:
        found: list[Tool] = []
        refused: list[str] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            found += [self._tool(one) for one in page.tools if _is_fit(one)]
            refused += [one.name for one in page.tools if not _is_fit(one)]
            cursor = page.next_cursor
            if not cursor or len(found) >= MAX_TOOLS:
                break
        if len(found) > MAX_TOOLS or cursor:
            self._problem = f"it has more than {MAX_TOOLS} tools; only the first ones are offered"
        elif refused:
            names = ", ".join(one_line(name, 40) for name in refused[:5])
            self._problem = f"these tools have names or schemas that cannot be offered: {names}"
        return found[:MAX_TOOLS]

    def _tool(self, given: Any) -> Tool:
        name: str = given.name

        async def run(arguments: Mapping[str, Any]) -> str:
            return await self._call(name, arguments)

        return Tool(
            name,
            one_line(given.description or given.title or "", MAX_DESCRIPTION),
            {"type": "object", "properties": {}} | given.input_schema,
            run,
            key=f"{self.spec.name}/{self.spec.digest}/{name}",
            owner=self.spec.name,
        )

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Call a tool; return its result as text. Raises ToolError with one sentence."""
        if self._client is None:
            why = self.problem or "it was switched off"
            raise ToolError(f"the server {self.spec.name} does not run: {why}")
        try:
            result = await self._until_end(self._client.call_tool(name, dict(arguments)))
        except TimeoutError:
            raise ToolError(
                f"the server {self.spec.name} did not answer within {CALL_SECONDS:.0f} s"
            ) from None
        except ToolError:
            raise
        except Exception as error:  # as above
            if is_end(error):
                self._end(explain(error))
            raise ToolError(f"the server {self.spec.name} failed: {explain(error)}") from None
        text = text_of(result)
        if result.is_error:
            raise ToolError(text or "the tool failed and said nothing")
        return text

    async def _until_end(self, call: Any) -> "CallToolResult":
        """Wait for a call, its time limit, or the end of the server, whichever comes first."""
        asking = asyncio.ensure_future(call)
        waits = [asking, *([self._task] if self._task else [])]
        try:
            await asyncio.wait(waits, timeout=CALL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            if self._task is None or self._task.done():
                raise ToolError(f"the server {self.spec.name} ended during the call: {self.problem}")
            raise TimeoutError
        finally:
            if not asking.done():
                asking.cancel()
                with suppress(asyncio.CancelledError):
                    await asking


def _is_fit(tool: Any) -> bool:
    schema = tool.input_schema
    fits = isinstance(schema, dict) and len(json.dumps(schema)) <= MAX_SCHEMA
    return fits and TOOL_NAME.fullmatch(tool.name) is not None


def text_of(result: "CallToolResult") -> str:
    """Return a result as text; of what is no text only the kind and the size are told."""
    parts = [_part(part) for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(part for part in parts if part)


def _part(part: Any) -> str:
    match part.type:
        case "text":
            return part.text
        case "resource" if isinstance(getattr(part.resource, "text", None), str):
            return part.resource.text
        case "resource_link":
            return f"[a link: {part.uri}]"
    size = len(getattr(part, "data", None) or getattr(getattr(part, "resource", None), "blob", None) or "")
    return f"[{part.type} of about {size * 3 // 4:,} bytes, which cannot be read as text]"


def is_end(error: Exception) -> bool:
    """Whether an error means that the connection has ended."""
    from mcp import MCPError
    from mcp.types import CONNECTION_CLOSED

    return not isinstance(error, MCPError) or error.code == CONNECTION_CLOSED


def silence_sdk() -> None:
    """Keep the SDK's log off the screen; what went wrong becomes a sentence."""
    for name in ("mcp", "client", "httpx2", "httpcore2"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())


def explain(error: BaseException) -> str:
    """Return what went wrong in one line; of a group of errors the first that says something."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    if isinstance(error, FileNotFoundError):
        return f"there is no program {one_line(str(error.filename), 200)}"
    return one_line(getattr(error, "strerror", None) or str(error), 300) or type(error).__name__
