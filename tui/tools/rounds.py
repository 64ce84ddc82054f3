"""The calls of one reply, answered: consent, then all of them together, each within its time.

Whatever happens to a call, the model gets one sentence about it. Knows no engine.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from ...core.conversation.summary import ToolResult
from ...core.errors import UsageError
from ...core.events import Done, ToolUse
from ..text.figures import format_size
from ..text.sanitise import printable
from .base import LEAST_RESULT, MAX_RESULT, Tool, ToolError, bound_result, one_line
from .consent import Decision, Question
from .toolbox import Toolbox

CANCELLED = "The user cancelled this call."
UNREAD = (
    "A tool call in your reply could not be read, so nothing was done. Write it again, in exactly the form "
    "that was described."
)
NO_MORE = "The limit of {} rounds of tool calls is reached. Nothing was done. Answer now, without tools."
Ask = Callable[[Question], Awaitable[Decision]]


def wants_answer(done: Done) -> bool:
    """Whether a reply ended with calls, or with what should have been one."""
    return done.finish_reason == "stop" and bool(done.tool_calls or done.unread_call)


class ToolRounds:
    """Answers the calls of replies; `ask` asks the user, one question at a time."""

    def __init__(self, toolbox: Toolbox, ask: Ask, clock: Callable[[], float] = time.monotonic):
        self.toolbox = toolbox
        self._ask, self._clock = ask, clock
        self._asking = asyncio.Lock()
        self._tasks: list[asyncio.Task[ToolResult]] = []

    @property
    def busy(self) -> bool:
        """Whether calls run, or the user is asked about one."""
        return bool(self._tasks)

    def cancel(self) -> None:
        """Cancel the calls; the model is told so."""
        for task in self._tasks:
            task.cancel()

    async def answer(self, done: Done, *, room: int | None = None) -> list[ToolResult]:
        """Return a result for each call of a reply, in their order.

        `room` is that of the context, in tokens.
        """
        count = len(done.tool_calls)
        limit = MAX_RESULT
        if room is not None:  # a token may be as short as a character
            limit = min(max(room // max(count, 1) // 2, LEAST_RESULT), MAX_RESULT)
        self._tasks = [asyncio.create_task(self._answer(call, limit)) for call in done.tool_calls]
        begin = self._clock()
        try:
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            tasks, self._tasks = self._tasks, []
            for task in tasks:  # if this was cancelled itself
                task.cancel()
        seconds = self._clock() - begin
        results = [
            ToolResult(call.name, CANCELLED, seconds) if task.cancelled() else task.result()
            for call, task in zip(done.tool_calls, tasks, strict=True)
        ]
        return [*results, *([ToolResult("", UNREAD)] if done.unread_call else [])]

    async def _answer(self, call: ToolUse, limit: int) -> ToolResult:
        begin = self._clock()
        try:
            tool = self._find(call)
            await self._require_consent(tool, call)
            begin = self._clock()
            text = bound_result(await tool.run(call.arguments), limit)
        except ToolError as error:
            text = f"Error: {bound_result(str(error), limit)}"
        return ToolResult(call.name, text, self._clock() - begin)

    def _find(self, call: ToolUse) -> Tool:
        tool = self.toolbox.find(call.name)
        if tool is None:
            known = ", ".join(one.name for one in self.toolbox.offered()) or "none"
            raise ToolError(f"there is no tool {one_line(call.name, 60)}; there are {known}")
        return tool

    async def _require_consent(self, tool: Tool, call: ToolUse) -> None:
        """Ask the user, if that is needed. Raises ToolError if the answer is no."""
        async with self._asking:
            if not self.toolbox.consent.needs_question(tool):
                return
            decision = await self._ask(Question(tool, call.arguments))
            with suppress(UsageError):  # for this time it counts
                self.toolbox.consent.record(tool, decision)
        if not decision.allowed:
            reason = one_line(decision.reason, 500)
            raise ToolError(f"the user refused this call{': ' if reason else ''}{reason or ''}")


def refuse_all(done: Done, limit: int) -> list[ToolResult]:
    """Return results that tell the model to answer without further calls."""
    text = NO_MORE.format(limit)
    names: Sequence[str] = [call.name for call in done.tool_calls] or [""]
    return [ToolResult(name, text) for name in names]


def describe_result(result: ToolResult) -> str:
    """Return the name, time and size of a result."""
    seconds = "" if result.seconds is None else f"{result.seconds:.1f} s"
    name = " ".join(printable(result.name).split()) or "call"
    return " · ".join(part for part in (name, seconds, format_size(len(result.text.encode()))) if part)
