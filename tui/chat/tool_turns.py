"""The turns of a chat in which tools answer: offered before each reply, and called until there is an answer.

Owns the toolbox of the chat and the order of its rounds. A call that is cancelled, refused or impossible is
answered to the model in a sentence, and the reply goes on.
"""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ...core.conversation.summary import ConversationState, ToolResult
from ...core.errors import UsageError
from ...core.events import Done
from ..tools.consent import Decision, Question
from ..tools.rounds import ToolRounds, refuse_all, wants_answer
from ..tools.toolbox import Toolbox
from .meter import Status
from .replies import Replies
from .view import View

if TYPE_CHECKING:
    from ..user.settings import Settings


class ToolHost(Protocol):
    """The parts of a chat that its tools need."""

    view: View
    settings: "Settings"
    state: ConversationState
    replies: Replies

    @property
    def status(self) -> Status: ...
    async def request(self, method: str, **params: Any) -> Any: ...


class ToolTurns:
    """The tools of one chat. `paused`: calls are not answered, as in a summary that nobody asked for."""

    def __init__(self, chat: ToolHost, toolbox: Toolbox | None = None):
        self.toolbox = toolbox or Toolbox(chat.settings)
        self.paused = False
        self._chat = chat
        self._rounds = ToolRounds(self.toolbox, self._ask)
        self._offered: list[dict[str, Any]] | None = None  # what the session offers, where that is known
        self._leaving = False
        self._waiting: asyncio.Task[None] | None = None  # for the servers that start

    @property
    def busy(self) -> bool:
        """Whether calls run, or wait for the user's consent, or a server is waited for."""
        return self._rounds.busy or self._waiting is not None

    async def _ask(self, question: Question) -> Decision:
        return await self._chat.view.ask_tool(question)

    def cancel(self) -> None:
        """Cancel the calls that run, or the wait for a server; the model goes on without."""
        self._rounds.cancel()
        if self._waiting is not None:
            self._waiting.cancel()

    def leave(self) -> None:
        """Cancel the calls, and begin no others."""
        self._leaving = True
        self.cancel()

    def forget(self, *, conversation: bool) -> None:
        """Forget what the session offers, and with the `conversation` also what was allowed in it."""
        self._offered = None
        if conversation:
            self.toolbox.consent.forget_conversation()

    async def offer(self) -> None:
        """Wait for the servers, and let the session offer the tools that are on now."""
        self.toolbox.start()
        self._tell_problems()
        if starting := self.toolbox.starting:
            self._show(f"starting {', '.join(starting)}")
            self._waiting = asyncio.create_task(self.toolbox.settled())
            await asyncio.wait([self._waiting])
            self._waiting = None
            self._show("")
        if self._leaving:
            raise UsageError("the chat ends, so nothing is asked")
        self._tell_problems()
        wanted = self.toolbox.schemas()
        names = tuple(tool["function"]["name"] for tool in wanted)
        is_known = self._offered == wanted or not wanted
        if names != self._chat.state.tools or not is_known:
            await self._chat.request("set_tools", tools=wanted)
        self._offered = wanted

    def _tell_problems(self) -> None:
        for problem in self.toolbox.take_problems():
            self._chat.view.note(problem, "warning")

    async def go_on(self, done: Done | None, settings: Mapping[str, Any]) -> None:
        """Answer the calls of a reply, and those of the replies that follow, until one has none."""
        limit, rounds = self._chat.settings["max_tool_rounds"], 0
        while done is not None and wants_answer(done) and not (self.paused or self._leaving):
            rounds += 1
            if rounds > limit + 1:
                note = f"the model goes on calling tools; max_tool_rounds allows {limit} rounds"
                self._chat.view.note(note, "warning")
                return
            results = refuse_all(done, limit) if rounds > limit else await self._answer(done)
            if self._leaving:
                return
            done = await self._chat.replies.answer_tools(results, settings)

    async def _answer(self, done: Done) -> list[ToolResult]:
        state, status = self._chat.state, self._chat.status
        status.phase = "tools"
        self._show(", ".join(dict.fromkeys(call.name for call in done.tool_calls)))
        try:
            return await self._rounds.answer(done, room=state.context_limit - state.tokens)
        finally:
            self._show("")

    def _show(self, calls: str) -> None:
        self._chat.status.tools = calls
        self._chat.view.status(self._chat.status)
