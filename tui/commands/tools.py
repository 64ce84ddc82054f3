"""The command that lists and switches tools, and the question about a project's servers."""

import shlex
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from ..text.report import Lines, Report, Table
from ..tools.base import Tool
from ..tools.mcp_server import McpServer, has_sdk, require_sdk
from ..tools.server_specs import read_settings
from ..tools.toolbox import Toolbox
from ..user.paths import config_file, make_config_dir
from ..user.settings import TOOL_NAMES
from ..user.toml_file import edit_toml
from .base import Command, Front, first_words, starting

if TYPE_CHECKING:
    from ..chat.controller import Chat

ACTIONS = ("on", "off", "ask", "add", "remove")
ASKING = {"never": "never", "until allowed": "yes", "always": "always"}


class Tools(Command):
    """List the tools that the model may call, and the servers they come from; switch, add or remove them.

    /tools on NAME and /tools off NAME switch a tool or a server, from the next reply on. /tools add NAME
    COMMAND ... saves a server of the Model Context Protocol in your settings and starts it; an address in
    place of the command is asked over HTTP. /tools remove NAME removes it. /tools ask NAME asks again about
    a tool that was always allowed. Servers need the extra `tools`.
    """

    names = ("tools", "mcp")
    usage = "[on|off|ask|add|remove NAME [COMMAND ...]]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        action, space, name = argument.partition(" ")
        if not space:
            return starting(action, ACTIONS)
        toolbox = chat.tools.toolbox
        known = [tool.name for tool in toolbox.all_tools()] if action in ("on", "off", "ask") else []
        servers = [] if action in ("ask", "add") else [*toolbox.servers]
        return [f"{action} {one}" for one in starting(name, [*known, *servers])]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        toolbox = chat.tools.toolbox
        toolbox.start()
        action, _, rest = argument.partition(" ")
        name, _, command = rest.strip().partition(" ")
        if not argument:
            front.report(tools_report(toolbox))
            return
        if action not in ACTIONS or not name:
            raise self.wrong(f"{argument:.40} is not understood")
        match action:
            case "on" | "off":
                await _switch(chat, front, name, on=action == "on")
            case "ask":
                toolbox.consent.revoke(_tool(toolbox, name))
                front.note(f"you are asked again before {name} is called")
            case "add":
                await _add(toolbox, front, name, command.strip())
            case "remove":
                await _remove(toolbox, front, name)


async def _switch(chat: "Chat", front: Front, name: str, *, on: bool) -> None:
    toolbox, word = chat.tools.toolbox, "on" if on else "off"
    if name in TOOL_NAMES:
        others = [one for one in chat.settings["tools"] if one != name]
        chat.settings.change("tools", [*others, name] if on else others, f"/tools {word}")
    else:
        await toolbox.switch(name, on=on)
    server = toolbox.servers.get(name)
    if on and server is not None and server.state == "failed":
        raise UsageError(f"the server {name} could not be started: {server.problem}")
    front.note(f"{name} is {word} from the next reply")


def _tool(toolbox: Toolbox, name: str) -> Tool:
    tool = next((one for one in toolbox.all_tools() if one.name == name), None)
    if tool is None:
        raise UsageError(f"there is no tool {name:.60}: /tools lists them")
    return tool


async def _add(toolbox: Toolbox, front: Front, name: str, command: str) -> None:
    """Save a server in the user's settings, and start it."""
    require_sdk()
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"/tools add: the command cannot be read: {error}") from None
    if not words:
        raise UsageError("/tools add: the command is missing: /tools add NAME COMMAND ...")
    is_address = len(words) == 1 and words[0].startswith(("http://", "https://"))
    fields: dict[str, Any] = {"url": words[0]} if is_address else {"command": words[0], "args": words[1:]}
    (spec,) = read_settings({name: fields}, "/tools add")
    if name in toolbox.servers:
        raise UsageError(f"there is a server {name} already: /tools remove {name} comes first")
    make_config_dir()
    edit_toml(config_file(), lambda table: table.setdefault("servers", {}).update({name: fields}))
    server = toolbox.add(spec)
    await server.settled()
    if server.state != "on":
        raise UsageError(f"the server {name} is saved, but it could not be started: {server.problem}")
    front.note(f"the server {name} is saved in {config_file()} and offers {_count(server)}")


async def _remove(toolbox: Toolbox, front: Front, name: str) -> None:
    server = toolbox.servers.get(name)
    if server is None or server.spec.origin != "settings":
        raise UsageError(f"your settings name no server {name:.60}: /tools lists them")

    def forget(table: MutableMapping[str, Any]) -> None:
        table.get("servers", {}).pop(name, None)
        if not table.get("servers"):
            table.pop("servers", None)

    edit_toml(config_file(), forget)
    await toolbox.remove(name)
    front.note(f"the server {name} is stopped, and no longer in {config_file()}")


def _count(server: McpServer) -> str:
    count = len(server.tools)
    return f"{count} tool{'' if count == 1 else 's'}"


def tools_report(toolbox: Toolbox) -> Report:
    """Return a table of the tools, one of the servers, and what went wrong."""
    tools = [
        (
            tool.name,
            "on" if toolbox.is_on(tool) else "off",
            "allowed" if toolbox.consent.is_kept(tool) else ASKING[tool.asks],
            tool.owner or "qchat",
            first_words(tool.description, 100),
        )
        for tool in toolbox.all_tools()
    ]
    servers = [
        (name, server.state, _count(server), server.spec.origin, _described(server))
        for name, server in toolbox.servers.items()
    ]
    parts = [Table(("tool", "", "asks", "from", "what it does"), tools)]
    if servers:
        parts.append(Table(("server", "", "offers", "from", "what it is"), servers))
    said: list[str] = []
    if project := toolbox.open_question:
        said.append(f"{project.path} names servers, which were not started: you were not asked yet")
    return Report("Tools · /tools on NAME", (*parts, Lines(said, "dim")))


def _described(server: McpServer) -> str:
    return f"{server.problem} ({server.spec.target})" if server.problem else server.spec.target


async def ask_about_project(chat: "Chat", front: Front) -> None:
    """Ask once whether the servers that the working folder's project names may be started."""
    toolbox = chat.tools.toolbox
    toolbox.read()
    project = toolbox.open_question
    if project is None or not has_sdk():
        return
    lines = [f"  {spec.name}: {spec.target}" for spec in project.specs]
    question = "\n".join([f"{project.path} wants to start these servers of tools:", *lines, "Start them?"])
    answer = await front.confirm(question)
    toolbox.answer_project(allowed=answer)
