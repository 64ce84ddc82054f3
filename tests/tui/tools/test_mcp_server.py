"""Servers of the Model Context Protocol, faked without the SDK: calls, and everything that can go wrong."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qchat.tui.tools import mcp_server
from qchat.tui.tools.base import Tool, ToolError
from qchat.tui.tools.mcp_server import McpServer
from qchat.tui.tools.server_specs import ServerSpec
from tests.paths import ROOT
from tests.run_async import run_async
from tests.tui.tools.mcp_stage import FAKE, needs_mcp, serving_http, stdio_spec

pytestmark = needs_mcp


def with_server(spec: ServerSpec, check: Callable[[McpServer], Awaitable[None]]) -> McpServer:
    """Start a server, check it, and stop it; no process of it is left."""
    server = McpServer(spec)

    async def main() -> None:
        server.start()
        await server.settled()
        try:
            await check(server)
        finally:
            await server.stop()

    run_async(main())
    return server


def tool(server: McpServer, name: str) -> Tool:
    return next(one for one in server.tools if one.name == name)


@contextmanager
def spec_of(kind: str) -> Iterator[ServerSpec]:
    if kind == "stdio":
        yield stdio_spec("fake")
        return
    with serving_http() as url:
        yield ServerSpec("fake", "settings", url=url)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stdio", "http"])
def test_tools_are_listed_and_called_over_both_transports(kind: str):
    async def check(server: McpServer) -> None:
        assert (server.state, server.problem) == ("on", "")
        echo = tool(server, "echo")
        assert (echo.owner, echo.description) == ("fake", "The tool echo.")
        assert echo.parameters["required"] == ["text"]
        assert await asyncio.gather(*(echo.run({"text": f"hi {n}"}) for n in range(5))) == [
            f"hi {n}" for n in range(5)
        ]
        assert len(await tool(server, "big").run({})) == 1_000_000
        assert await tool(server, "picture").run({}) == (
            "[image of about 3,000 bytes, which cannot be read as text]"
        )
        with pytest.raises(ToolError, match=r"^no such city$"):
            await tool(server, "fail").run({})

    with spec_of(kind) as spec:
        server = with_server(spec, check)
    assert (server.state, server.tools) == ("off", [])


@pytest.mark.parametrize("kind", ["stdio", "http"])
def test_fifty_tools_are_offered_and_more_than_a_context_holds_are_cut(kind: str):
    async def check(server: McpServer) -> None:
        assert len(server.tools) == min(7 + count, mcp_server.MAX_TOOLS)
        assert await server.tools[-1].run({}) == server.tools[-1].name
        assert ("more than 128 tools" in server.problem) == (count > 100)

    for count in (50, 200):
        if kind == "stdio":
            with_server(stdio_spec("fake", f"tools={count}"), check)
        else:
            with serving_http(f"tools={count}") as url:
                with_server(ServerSpec("fake", "settings", url=url), check)


def test_a_server_that_ends_in_a_call_is_a_sentence_and_starts_again():
    async def check(server: McpServer) -> None:
        hang = asyncio.create_task(tool(server, "hang").run({}))
        await asyncio.sleep(0)
        with pytest.raises(ToolError, match=r"^the server fake (failed|ended during the call)"):
            await tool(server, "crash").run({})
        with pytest.raises(ToolError, match="the server fake"):
            await hang
        while server.state == "on":
            await asyncio.sleep(0.01)
        assert server.state == "failed"
        assert "out of luck" in server.problem
        names = [one.name for one in server.tools]
        with pytest.raises(ToolError, match=r"^the server fake does not run: .*out of luck"):
            await tool(server, "echo").run({"text": "hi"})
        server.start()
        await server.settled()
        assert [one.name for one in server.tools] == names
        assert await tool(server, "echo").run({"text": "hi"}) == "hi"

    with_server(stdio_spec("fake"), check)


def test_a_cancelled_call_leaves_the_server_usable():
    async def check(server: McpServer) -> None:
        hang = asyncio.create_task(tool(server, "hang").run({}))
        await asyncio.sleep(0.05)
        hang.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hang
        assert await tool(server, "echo").run({"text": "hi"}) == "hi"

    with_server(stdio_spec("fake"), check)


def test_a_call_that_hangs_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mcp_server, "CALL_SECONDS", 0.3)

    async def check(server: McpServer) -> None:
        with pytest.raises(ToolError, match=r"^the server fake did not answer within 0 s$"):
            await tool(server, "hang").run({})
        assert await tool(server, "echo").run({"text": "hi"}) == "hi"

    with_server(stdio_spec("fake"), check)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stdio", "http"])
def test_a_server_that_never_answers_initialize_fails_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr(mcp_server, "START_SECONDS", 0.5)

    async def check(server: McpServer) -> None:
        assert (server.state, server.tools) == ("failed", [])
        assert server.problem == "it did not answer within 0 s"

    if kind == "stdio":
        with_server(stdio_spec("fake", "mute"), check)
    else:
        with serving_http("mute") as url:
            with_server(ServerSpec("fake", "settings", url=url), check)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (("no-such-program-at-all",), "there is no program no-such-program-at-all"),
        ((sys.executable, "-c", "import sys; sys.exit('bad luck')"), "bad luck"),
        ((sys.executable, "-c", "print('hello'); input()"), ""),
    ],
)
def test_a_program_that_is_no_server_fails_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], problem: str, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(mcp_server, "START_SECONDS", 3.0)

    async def check(server: McpServer) -> None:
        assert server.state == "failed"
        assert problem in server.problem and server.problem and "\n" not in server.problem

    with_server(ServerSpec("fake", "settings", command), check)
    assert capfd.readouterr() == ("", "")


def test_an_address_where_nobody_listens_is_a_sentence():
    async def check(server: McpServer) -> None:
        assert server.state == "failed"
        assert server.problem and "\n" not in server.problem

    with_server(ServerSpec("fake", "settings", url="http://127.0.0.1:9/mcp"), check)


@pytest.mark.slow
def test_stopping_leaves_no_process(tmp_path: Path):
    """Not even one that ignores the end of its input, and a signal to end."""
    note = tmp_path / "pid"
    program = (
        "import os, signal, sys, threading\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(note)!r}, 'w').write(str(os.getpid()))\n"
        f"sys.argv = ['fake', 'stdio']\n"
        f"source = open({str(FAKE)!r}).read().replace('os._exit(0)', 'threading.Event().wait()')\n"
        "exec(compile(source, 'fake', 'exec'), {'__name__': '__main__'})\n"
    )

    async def check(server: McpServer) -> None:
        assert server.state == "on", server.problem

    with_server(ServerSpec("fake", "settings", (sys.executable, "-c", program)), check)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_without_the_sdk_a_server_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)

    async def check(server: McpServer) -> None:
        assert (server.state, server.problem) == ("failed", mcp_server.MISSING)

    with_server(stdio_spec("fake"), check)


def test_the_sdk_is_not_imported_before_a_server_starts():
    script = (
        "import sys; import qchat.tui.cli.main, qchat.tui.chat.controller, qchat.tui.commands, "
        "qchat.tui.cli.oneshot_tools; "
        "print(*(name for name in ('mcp', 'pydantic', 'jsonschema') if name in sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".dev")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == ""


def test_odd_results_are_passed_on_whole():
    async def check(server: McpServer) -> None:
        text: Any = await tool(server, "odd").run({})
        assert "<|im_start|>system" in text
        began = time.monotonic()
        assert await tool(server, "echo").run({"text": "x"}) == "x"
        assert time.monotonic() - began < 10

    with_server(stdio_spec("fake"), check)
