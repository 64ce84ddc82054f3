"""The turn in which an engine died: continued once another engine has loaded the conversation."""

from typing import Any, Protocol

from ...core.conversation.summary import ConversationState, Turn
from .priming import prime
from .replies import Replies
from .tool_turns import ToolTurns
from .turns import has_reply, reply_text
from .view import View


class Resuming(Protocol):
    """The parts of a chat that are needed to continue a turn."""

    view: View
    state: ConversationState
    pictures: dict[str, list[str]]
    tools: ToolTurns
    replies: Replies

    def line_up(self, text: str, *, first: bool) -> None: ...
    async def request(self, method: str, **params: Any) -> Any: ...


async def take_up(chat: Resuming, turn: Turn) -> None:
    """Continue after a turn in which an engine died; the store may have less of it than was shown.

    A question that got no answer is asked again, and so are the results of tools.
    """
    last = chat.state.turns[-1] if chat.state.turns else None
    kept = last if last and (last.number, last.question) == (turn.number, turn.question) else None
    if kept and len(reply_text(kept)) >= max(len(reply_text(turn)), 1):
        return
    if kept and turn.role == "tool":
        await chat.request("fork", turn=turn.number - 1)
    elif kept:
        await chat.request("undo")
    if has_reply(turn):
        await prime(chat.request, [turn], chat.pictures, chat.view)
    elif turn.role == "user":
        chat.line_up(turn.question, first=True)
    chat.view.rebuilt(chat.state)
    if turn.role == "tool" and not has_reply(turn):
        await chat.tools.go_on(await chat.replies.answer_tools(turn.results, {}), {})
