"""Which servers there are, which of them may be started, what their tools are called, what was agreed to."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qchat.core.errors import UsageError
from qchat.tui.tools.base import Tool
from qchat.tui.tools.consent import Consent, Decision, Question
from qchat.tui.tools.mcp_server import McpServer
from qchat.tui.tools.server_specs import read_project, read_settings
from qchat.tui.tools.toolbox import Toolbox
from qchat.tui.user.paths import state_dir
from qchat.tui.user.settings import Settings
from tests.run_async import run_async
from tests.tui.tools.mcp_stage import needs_mcp, serving_http, stdio_command, stdio_spec


async def nothing(_: Any) -> str:
    return ""


def tool(name: str = "echo", key: str = "fake/1/echo", **fields: Any) -> Tool:
    return Tool(name, "", {"type": "object", "properties": {}}, nothing, key=key, owner="fake", **fields)


def with_box(
    folder: Path,
    check: Callable[[Toolbox], Awaitable[None]],
    servers: dict[str, Any] | None = None,
) -> None:
    options = Settings().replaced("test", servers=servers or {})

    async def main() -> None:
        box = Toolbox(options, folder)
        try:
            box.start()
            await box.settled()
            await check(box)
        finally:
            await box.close()

    run_async(main())


# --- what the settings and a project name ---


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "needs either a command or a url"),
        ({"command": "a", "url": "http://127.0.0.1/"}, "needs either a command or a url"),
        ({"command": 3}, "command is 3, wanted a text"),
        ({"command": "a", "args": "b"}, "args is 'b', wanted a list of texts"),
        ({"command": "a", "env": {"A": 1}}, "env is {'A': 1}, wanted a table of texts"),
        ({"command": "a", "args": ["${NOT_SET_HERE}"]}, "needs the variable NOT_SET_HERE, which is not set"),
        ({"url": "ftp://127.0.0.1/"}, "is no address, wanted http"),
        ({"url": "http://[::1"}, "is no address"),
        (
            {"url": "http://example.com/mcp"},
            "so its address must be https",
        ),
        ({"url": "http://127.0.0.1/", "type": "sse"}, "speaks the old transport sse, wanted http"),
        (3, "is 3, wanted a table"),
    ],
)
def test_a_server_that_makes_no_sense_is_a_sentence(fields: Any, sentence: str):
    with pytest.raises(UsageError) as error:
        read_settings({"fake": fields}, "config.toml")
    assert str(error.value).startswith("config.toml: the server fake")
    assert sentence in str(error.value)


def test_the_settings_may_name_other_machines_and_a_project_only_this_one(tmp_path: Path):
    (spec,) = read_settings({"far": {"url": "https://example.com/mcp"}}, "config.toml")
    assert spec.url == "https://example.com/mcp"
    for url, is_here in (
        ("http://127.0.0.1:8000/mcp", True),
        ("http://localhost/", True),
        ("http://[::1]:80/mcp", True),
        ("https://example.com/mcp", False),
        ("http://127.0.0.1.example.com/", False),
        ("http://127.0.0.1@example.com/", False),
        ("http://169.254.169.254/latest", False),
        ("http://0.0.0.0/", False),
    ):
        write_project(tmp_path, {"far": {"type": "http", "url": url}})
        if is_here:
            assert read_project(tmp_path) is not None
        else:
            with pytest.raises(UsageError, match="a project may only name this machine"):
                read_project(tmp_path)


def test_variables_are_expanded_as_other_programs_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PLACE", "/there")
    write_project(
        tmp_path,
        {"a": {"command": "${PLACE}/run", "args": ["${OTHER_PLACE:-here}"], "env": {"B": "${PLACE}"}}},
    )
    project = read_project(tmp_path)
    assert project is not None
    (spec,) = project.specs
    assert (spec.command, spec.env) == (("/there/run", "here"), {"B": "/there"})


def write_project(folder: Path, servers: Any) -> None:
    (folder / ".mcp.json").write_text(json.dumps({"mcpServers": servers}))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"mcpServers": []}', '{"mcpServers": {"a b": {}}}', " " * 300_000]
)
def test_a_project_file_that_makes_no_sense_is_one_sentence(tmp_path: Path, content: str):
    (tmp_path / ".mcp.json").write_text(content)

    async def check(box: Toolbox) -> None:
        (problem,) = box.take_problems()
        assert ".mcp.json" in problem and "\n" not in problem
        assert box.open_question is None and not box.servers
        assert box.take_problems() == []

    with_box(tmp_path, check)


@pytest.mark.parametrize("content", [None, "{}", '{"mcpServers": {}}', '{"other": 1}'])
def test_a_project_without_servers_asks_nothing(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / ".mcp.json").write_text(content)

    async def check(box: Toolbox) -> None:
        assert box.take_problems() == [] and box.open_question is None

    with_box(tmp_path, check)


# --- nothing of a project starts unasked ---


@needs_mcp
def test_a_project_starts_nothing_before_its_user_agreed_to_this_content(tmp_path: Path):
    mark = tmp_path / "started"

    def write(*wishes: str) -> None:
        program, *arguments = stdio_command(f"touch={mark}", *wishes)
        write_project(tmp_path, {"fake": {"command": program, "args": arguments}})

    async def unasked(box: Toolbox) -> None:
        assert box.open_question is not None
        assert not box.servers and not box.offered()
        with pytest.raises(UsageError, match="there is no tool or server fake"):
            await box.switch("fake", on=True)

    async def refused(box: Toolbox) -> None:
        box.answer_project(allowed=False)
        assert box.open_question is None and not box.servers

    async def known(box: Toolbox) -> None:
        assert box.open_question is None and not box.servers

    async def allowed(box: Toolbox) -> None:
        box.answer_project(allowed=True)
        await box.settled()
        assert box.find("echo")

    async def started(box: Toolbox) -> None:
        assert box.open_question is None
        assert box.find("echo")

    write()
    for check in (unasked, unasked, refused, known):
        with_box(tmp_path, check)
        assert not mark.exists()
    write("tools=1")  # another content is another question
    with_box(tmp_path, unasked)
    assert not mark.exists()
    with_box(tmp_path, allowed)
    assert mark.exists()
    with_box(tmp_path, started)
    mark.unlink()
    write("tools=2")
    with_box(tmp_path, unasked)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write("tools=1")
    (tmp_path / ".mcp.json").rename(elsewhere / ".mcp.json")
    with_box(elsewhere, unasked)  # the same content in another folder
    assert not mark.exists()


@needs_mcp
def test_a_server_of_the_settings_stands_before_a_projects_of_the_same_name(tmp_path: Path):
    mark = tmp_path / "started"
    program, *arguments = stdio_command(f"touch={mark}")
    write_project(tmp_path, {"fake": {"command": program, "args": arguments}})
    mine, *rest = stdio_command("name=mine")

    async def check(box: Toolbox) -> None:
        box.answer_project(allowed=True)
        await box.settled()
        assert box.find("mine") and not mark.exists()
        assert "the settings have a server fake too" in " ".join(box.take_problems())

    with_box(tmp_path, check, {"fake": {"command": mine, "args": rest}})


# --- names ---


@needs_mcp
def test_tools_of_one_name_get_that_of_their_server_before_it(tmp_path: Path):
    def fake(*wishes: str) -> dict[str, Any]:
        program, *arguments = stdio_command(*wishes)
        return {"command": program, "args": arguments}

    servers = {"one": fake("name=calculate"), "two": fake("name=calculate"), "three": fake("name=only")}

    async def check(box: Toolbox) -> None:
        names = [tool.name for tool in box.all_tools()]
        assert len(set(names)) == len(names)
        assert {"calculate", "one_calculate", "two_calculate", "only", "one_big", "three_big"} <= set(names)
        assert "big" not in names
        one = box.find("one_calculate")
        assert one is not None and await one.run({"text": "hi"}) == "hi"
        assert names == [tool.name for tool in box.all_tools()], "the order stays"
        await box.switch("two", on=False)
        assert not box.find("two_calculate")
        await box.switch("only", on=False)
        assert not box.find("only") and box.find("three_big")
        await box.switch("only", on=True)
        assert box.find("only")
        await box.switch("two", on=True)
        assert box.find("two_calculate")

    with_box(tmp_path, check, servers)


@needs_mcp
def test_a_disabled_server_is_started_only_when_it_is_switched_on(tmp_path: Path):
    mark = tmp_path / "started"
    program, *arguments = stdio_command(f"touch={mark}")

    async def check(box: Toolbox) -> None:
        assert not mark.exists()
        await box.switch("fake", on=True)
        assert mark.exists() and box.find("echo")

    with_box(tmp_path, check, {"fake": {"command": program, "args": arguments, "disabled": True}})


@needs_mcp
def test_a_server_over_http_of_the_settings(tmp_path: Path):
    async def check(box: Toolbox) -> None:
        echo = box.find("echo")
        assert echo is not None and await echo.run({"text": "hi"}) == "hi"

    with serving_http() as url:
        with_box(tmp_path, check, {"fake": {"url": url}})


# --- consent ---


def test_consent_holds_as_long_as_it_was_given_for():
    consent = Consent()
    one, other = tool(), tool("other", "fake/1/other")
    consent.record(one, Decision(True, "once"))
    assert consent.needs_question(one)
    consent.record(one, Decision(True, "conversation"))
    assert not consent.needs_question(one) and consent.needs_question(other)
    consent.forget_conversation()
    assert consent.needs_question(one)
    consent.record(one, Decision(False, "always"))
    assert consent.needs_question(one)
    consent.record(one, Decision(True, "always"))
    assert not Consent().needs_question(one)
    assert Consent().needs_question(tool(key="fake/2/echo")), "another program under the same name"
    Consent().revoke(one)
    assert Consent().needs_question(one)


def test_a_tool_that_always_asks_always_asks():
    consent = Consent()
    shell = tool("shell", "qchat/shell", asks="always")
    for scope in ("once", "conversation", "always"):
        consent.record(shell, Decision(True, scope))
        assert consent.needs_question(shell)
    assert not Question(shell, {}).may_last
    assert not consent.needs_question(tool(asks="never"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"always": 3}', '{"always": {"fake/1/echo": 1}}', "\0"])
def test_a_damaged_file_is_no_consent(content: str):
    (state_dir() / "tools.json").write_text(content)
    assert Consent().needs_question(tool())
    Consent().record(tool(), Decision(True, "always"))
    assert not Consent().needs_question(tool())
    assert (state_dir() / "tools.json").stat().st_mode & 0o077 == 0


def test_a_question_shows_what_would_run_and_not_what_is_made_up():
    question = Question(
        tool(), {"command": "ls\nrm x", "odd": "a\x1b[2Kb", "n": 3, "list": ["x"], "\x1b[2Kname": "\u202e"}
    )
    assert question.title == "The model wants to call echo of the server fake"
    assert question.lines() == [
        "command: ls",
        "    rm x",
        'odd: "a\\u001b[2Kb"',
        "n: 3",
        'list: ["x"]',
        'name: "\\u202e"',
    ]


@needs_mcp
def test_closing_ends_servers_that_are_starting():
    async def main() -> None:
        server = McpServer(stdio_spec("fake", "mute"))
        server.start()
        await asyncio.sleep(0.05)
        await server.stop()
        assert server.state == "off"

    run_async(main())
