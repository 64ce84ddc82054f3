"""A conversation as the front end holds it: the engine's own turns, and the one that is being answered."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ...core.conversation.summary import (
    ConversationState,
    ShownPicture,
    ToolCall,
    ToolResult,
    Turn,
    TurnStats,
)
from ...core.events import CallEvent, Done, Text, Thought, ToolUse
from ...core.worker.wire import ModelInfo

if TYPE_CHECKING:
    from ..user.settings import Settings

NO_STATE = ConversationState(
    conversation=None,
    title="",
    system=None,
    history="preserve",
    tokens=0,
    context_limit=0,
    leaf=None,
    turns=(),
    branches=(),
)


def new_turn(
    number: int,
    question: str,
    model_name: str = "",
    results: Sequence[ToolResult] = (),
    pictures: Sequence[ShownPicture] = (),
) -> Turn:
    """Return a turn without a reply, which the named model will write; the engine has no node for it yet.

    With the `results` of tools it is a tool's turn.
    """
    return Turn(
        number=number,
        role="tool" if results else "user",
        question=question,
        thinking="",
        answer="",
        tool_calls=(),
        finish_reason="cancelled",
        node=0,
        siblings=(),
        stats=TurnStats(),
        created=time.time(),
        model_name=model_name,
        results=tuple(results),
        pictures=tuple(pictures),
    )


class RunningTurn:
    """A turn while it is being answered: the `turn` so far, and its `done`, cancelled until the end."""

    def __init__(self, turn: Turn):
        self.turn = turn
        self.done = Done("cancelled")

    def show(self, pictures: Sequence[ShownPicture]) -> None:
        """Add the question's pictures."""
        self.turn = replace(self.turn, pictures=tuple(pictures))

    def collect(self, batch: Sequence[CallEvent]) -> None:
        """Add a batch of events to the turn."""
        for event in batch:
            turn = self.turn
            match event:
                case Thought(text):
                    self.turn = replace(turn, thinking=turn.thinking + text)
                case Text(text):
                    self.turn = replace(turn, answer=turn.answer + text)
                case ToolUse(name, arguments):
                    self.turn = replace(turn, tool_calls=(*turn.tool_calls, ToolCall(name, arguments)))
                case Done():
                    self.done = event

    def fail(self, reason: str) -> None:
        """End the turn with an error; what was said stays."""
        self.turn, self.done = replace(self.turn, finish_reason="error"), Done("error", detail=reason)


def last_model(turns: Sequence[Turn]) -> str:
    """Return the name of the model that replied last; empty where that is unknown."""
    return next((turn.model_name for turn in reversed(turns) if turn.model_name), "")


def has_reply(turn: Turn) -> bool:
    """Whether there is anything of a reply."""
    return bool(reply_text(turn) or turn.tool_calls)


def reply_text(turn: Turn) -> str:
    """Return the thought and the answer as one text."""
    return turn.thinking + turn.answer


def kept_settings(state: ConversationState, number: int | None) -> dict[str, Any]:
    """Return what overrides the settings for a newly loaded model.

    A stored conversation, which `number` names, has its own.
    """
    if number is not None:
        return {"system": None, "history": None}
    kept = {"system": state.system} if state.system else {}
    return kept | ({"history": state.history} if state.turns else {})


def record_settings(settings: "Settings", model: ModelInfo, state: ConversationState) -> None:
    """Record the system prompt and history mode that a conversation brings along."""
    by_default = "preserve" if model.can_preserve_thinking else "strip"
    for name, value, default in (
        ("system", state.system or None, None),
        ("history", state.history, by_default),
    ):
        current = default if settings[name] is None else settings[name]
        if value != current:
            settings.record(name, value, "the conversation")


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return turns as messages for another session; turns without a reply are left out."""
    messages: list[dict[str, Any]] = []
    for turn in filter(has_reply, turns):
        thought = {"reasoning_content": turn.thinking} if turn.thinking else {}
        calls = [{"type": "function", "function": asdict(call)} for call in turn.tool_calls]
        messages += [{"role": "tool", "content": result.text} for result in turn.results]
        if turn.role == "user":
            messages.append({"role": "user", "content": turn.question})
        reply = {"role": "assistant", "content": turn.answer, **thought}
        messages.append(reply | ({"tool_calls": calls} if calls else {}))
    return messages


def last_question(turns: Sequence[Turn]) -> Turn | None:
    """Return the last turn in which the user spoke."""
    return next((turn for turn in reversed(turns) if turn.role == "user"), None)
