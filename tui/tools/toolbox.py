"""All the tools of a run: those of qchat's own that are on, and those of the servers that run.

Names are unique: where two tools share one, a server's has the server's name before its own. The order is
always the same, so that the prompt cache holds.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import UsageError
from .base import Tool
from .consent import Consent, keep_project_answer, project_answer
from .mcp_server import McpServer
from .own import own_tools
from .server_specs import Project, ServerSpec, read_project, read_settings


class Toolbox:
    """The tools that a chat offers. `settings` name own tools and servers; `folder` is the working folder.

    `problems` are sentences about what could not be read. Nothing of a project is started before its user
    agreed.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path | None = None):
        self.consent = Consent()
        self.servers: dict[str, McpServer] = {}
        self.problems: list[str] = []
        self.project: Project | None = None
        self._settings, self._folder = settings, folder
        self._off: set[str] = set()  # names of tools and servers that were switched off in this run
        self._own: dict[str, Tool] = {}
        self._is_read = False
        self._told: set[tuple[str, str]] = set()

    @property
    def own(self) -> dict[str, Tool]:
        """The tools of qchat's own by name, whether they are on or not."""
        self._own = self._own or own_tools(self._folder or Path.cwd())
        return self._own

    # servers

    def read(self) -> None:
        """Read which servers there are, once; start nothing."""
        if self._is_read:
            return
        self._is_read = True
        folder = self._folder or Path.cwd()
        try:
            for spec in read_settings(self._settings["servers"], "the settings"):
                self._add(spec)
        except UsageError as error:
            self.problems.append(str(error))
        try:
            self.project = read_project(folder)
        except UsageError as error:
            self.problems.append(str(error))
        if self.project is not None and project_answer(self.project.key):
            self._add_project(self.project)

    @property
    def open_question(self) -> Project | None:
        """The project that wants servers started, if its user was not asked about this content of it."""
        if self.project is None or project_answer(self.project.key) is not None:
            return None
        return self.project

    def answer_project(self, *, allowed: bool) -> None:
        """Keep the user's answer, and begin to start what is allowed. Raises UsageError."""
        if self.project is None:
            return
        keep_project_answer(self.project.key, allowed=allowed)
        if allowed:
            self._add_project(self.project)
            self.start()

    def _add_project(self, project: Project) -> None:
        for spec in project.specs:
            if spec.name in self.servers:
                self.problems.append(
                    f"{project.path}: the settings have a server {spec.name} too, and theirs is used"
                )
            else:
                self._add(spec)

    def _add(self, spec: ServerSpec) -> McpServer:
        self.servers[spec.name] = McpServer(spec)
        if spec.disabled:
            self._off.add(spec.name)
        self.servers = dict(sorted(self.servers.items()))
        return self.servers[spec.name]

    def add(self, spec: ServerSpec) -> McpServer:
        """Add a server, or another one in place of an earlier one that was stopped, and start it."""
        server = self._add(spec)
        self._off.discard(spec.name)
        server.start()
        return server

    async def remove(self, name: str) -> None:
        """Stop a server and forget it."""
        await self.servers.pop(name).stop()

    def start(self) -> None:
        """Begin to start the servers that are on and were never started."""
        self.read()
        for name, server in self.servers.items():
            if name not in self._off and server.state == "off":
                server.start()

    async def settled(self) -> None:
        """Wait until every server runs or failed."""
        await asyncio.gather(*(server.settled() for server in self.servers.values()))

    async def close(self) -> None:
        """Stop all servers."""
        await asyncio.gather(*(server.stop() for server in self.servers.values()))

    def take_problems(self) -> list[str]:
        """Return the sentences about what went wrong that were not taken before."""
        for name, server in self.servers.items():
            if server.problem and (name, server.problem) not in self._told:
                self._told.add((name, server.problem))
                self.problems.append(f"the server {name}: {server.problem}")
        problems, self.problems = self.problems, []
        return problems

    @property
    def starting(self) -> list[str]:
        """The names of the servers that are starting."""
        return [name for name, server in self.servers.items() if server.state == "starting"]

    # tools

    def all_tools(self) -> list[Tool]:
        """Return every tool under its unique name, whether it is on or not: own ones, then by server."""
        theirs = [tool for server in self.servers.values() for tool in server.tools]
        count = Counter(tool.name for tool in [*self.own.values(), *theirs])
        return [*self.own.values(), *_with_unique_names(theirs, count)]

    def is_on(self, tool: Tool) -> bool:
        """Whether the model is offered a tool."""
        if not tool.owner:
            return tool.name in self._settings["tools"]
        return tool.owner not in self._off and tool.key not in self._off

    def offered(self) -> list[Tool]:
        """Return the tools that are on."""
        return [tool for tool in self.all_tools() if self.is_on(tool)]

    def schemas(self) -> list[dict[str, Any]]:
        """Return the tools that are on in the form of chat templates."""
        return [tool.schema() for tool in self.offered()]

    def find(self, name: str) -> Tool | None:
        """Return the tool of this name that is on."""
        return next((tool for tool in self.offered() if tool.name == name), None)

    async def switch(self, name: str, *, on: bool) -> None:
        """Switch a server or one of its tools. Raises UsageError for an unknown name."""
        self.read()
        if (server := self.servers.get(name)) is not None:
            (self._off.discard if on else self._off.add)(name)
            await self._run(server, on=on)
            return
        tool = next((tool for tool in self.all_tools() if tool.name == name and tool.owner), None)
        if tool is None:
            raise UsageError(f"there is no tool or server {name:.60}: /tools lists them")
        (self._off.discard if on else self._off.add)(tool.key)

    async def _run(self, server: McpServer, *, on: bool) -> None:
        if on:
            server.start()
            await server.settled()
        else:
            await server.stop()


def _with_unique_names(tools: Sequence[Tool], count: Mapping[str, int]) -> Iterator[Tool]:
    taken = {name for name, times in count.items() if times == 1}
    for tool in tools:
        name = tool.name
        if count[name] > 1:
            name = base = f"{tool.owner}_{name}"
            number = 2
            while name in taken or name in count:
                name, number = f"{base}_{number}", number + 1
            taken.add(name)
        yield replace(tool, name=name)
