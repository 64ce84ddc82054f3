"""The tools of a one-shot run: nobody can be asked, so only what was named beforehand may run.

Everything about them goes to stderr. An event loop of its own keeps the servers between the rounds.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ...core.conversation.summary import ToolResult
from ...core.errors import UsageError
from ...core.events import Done
from ..text.output import note
from ..tools.consent import Decision, Question
from ..tools.mcp_server import has_sdk
from ..tools.rounds import ToolRounds, describe_result, refuse_all, wants_answer
from ..tools.toolbox import Toolbox
from ..user.settings import TOOL_NAMES

if TYPE_CHECKING:
    from ..user.settings import Settings

REASON = "nobody can be asked in this run"


class Conversation(Protocol):
    """The parts of a session that its tools need."""

    context_limit: int

    def cancel(self, reason: str = "") -> None: ...
    def prompt_ids(self, text: str | None = None, /) -> list[int]: ...


class OneShotTools:
    """The tools of one run, between `__enter__` and `__exit__`; those in `allowed` may be called unasked."""

    def __init__(self, settings: "Settings", allowed: Sequence[str], *, quiet: bool = False):
        own = [name for name in TOOL_NAMES if name in allowed]
        tools = list(dict.fromkeys([*settings["tools"], *own]))
        self._settings = settings.replaced("--yes-tools", tools=tools)
        self._allowed, self._quiet = set(allowed), quiet
        self._toolbox = Toolbox(self._settings)
        self._rounds_done, self.cancelled = 0, False

    def __enter__(self) -> "OneShotTools":
        """Start the servers. Raises UsageError for an allowed tool that does not exist."""
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        try:
            self._runner.run(self._start())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._toolbox.close())
        self._runner.close()

    async def _start(self) -> None:
        self._rounds = ToolRounds(self._toolbox, self._decide)
        self._toolbox.start()
        await self._toolbox.settled()
        for problem in self._toolbox.take_problems():
            self._tell(problem)
        if (project := self._toolbox.open_question) and has_sdk():
            self._tell(f"{project.path} names servers that were not started: a chat here asks about them")
        known = [tool.name for tool in self._toolbox.offered()]
        if unknown := sorted(self._allowed.difference(known)):
            names = ", ".join(known) or "none"
            raise UsageError(f"--yes-tools: there is no tool {unknown[0]:.60}; there are {names}")

    def _tell(self, sentence: str) -> None:
        if not self._quiet:
            note(sentence)

    def schemas(self) -> list[dict[str, Any]]:
        """Return the tools in the form of chat templates."""
        return self._toolbox.schemas()

    def beside(self, session: Conversation) -> "_Both":
        """Return what one ctrl+c stops: the reply, or the calls that run instead of it."""
        return _Both(session, self)

    def cancel(self) -> None:
        """Cancel the calls that run, from a signal handler."""
        self.cancelled = True
        self._loop.call_soon_threadsafe(self._rounds.cancel)

    def answer(self, done: Done, session: Conversation) -> list[ToolResult]:
        """Return the results of a reply's calls; none if it called nothing, or the run is to end."""
        limit = self._settings["max_tool_rounds"]
        if self.cancelled or not wants_answer(done):
            return []
        self._rounds_done += 1
        if self._rounds_done > limit + 1:
            self._tell(f"the model goes on calling tools; max_tool_rounds allows {limit} rounds")
            return []
        if self._rounds_done > limit:
            return refuse_all(done, limit)
        room = session.context_limit - len(session.prompt_ids())
        results = self._runner.run(self._rounds.answer(done, room=room))
        for result in results:
            self._tell(describe_result(result))
        return [] if self.cancelled else results

    async def _decide(self, question: Question) -> Decision:
        name = question.tool.name
        if name in self._allowed:
            return Decision(True)
        note(f"the model wants to call {name}, which was refused: --yes-tools {name} allows it")
        return Decision(False, reason=REASON)


class _Both:
    """A session and the tools beside it, cancelled together."""

    def __init__(self, session: Conversation, tools: OneShotTools):
        self._session, self._tools = session, tools

    def cancel(self) -> None:
        self._session.cancel()
        self._tools.cancel()
