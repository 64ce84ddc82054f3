"""The few keys that make sense at a moment, for the key bar."""

from typing import Literal

from ..chat.controller import Chat

REPLYING = ("reading", "thinking", "answering", "tools")
BUSY = (*REPLYING, "starting", "loading", "working")
Place = Literal["search", "completion", "transcript", "panel", "prompt"]


def useful_keys(chat: Chat, place: Place, half_context: int) -> list[tuple[str, str]]:
    """Return action ids with their words, for the `place` of the cursor.

    `half_context` is the context with which a dead engine may restart, 0 if there is none.
    """
    phase, everywhere = chat.status.phase, [("palette", "commands"), ("keys", "keys")]
    match place:
        case "search":
            return [("send", "take it"), ("history.search", "older"), ("stop", "back")]
        case "completion":
            return [("complete", "complete"), ("history.next", "next"), ("stop", "close")]
        case "transcript":
            names = ("copy", "edit", "retry", "fork")
            return [*((f"transcript.{name}", name) for name in names), ("stop", "back"), ("help", "keys")]
        case "panel":
            return [
                ("history.previous", "branch above"),
                ("history.next", "below"),
                ("send", "go there"),
                ("stop", "back"),
            ]
    if phase == "dead":
        smaller = [("wrap_up", f"restart with a context of {half_context:,}")] if half_context else []
        return [("send", "restart"), *smaller, ("quit", "quit"), *everywhere]
    thinking = ("thinking", describe_think(chat))
    if phase in REPLYING:
        second = ("wrap_up", "answer now") if phase == "thinking" else thinking
        return [("stop", "stop"), ("complete", "queue"), second, ("thoughts", "thoughts"), *everywhere]
    if chat.running_jobs:
        return [("send", "send"), ("stop", "stop the job"), *everywhere]
    idle = [("send", "send"), thinking, ("thoughts", "thoughts"), ("transcript", "conversation")]
    return [*idle, *everywhere]


def describe_think(chat: Chat) -> str:
    """Return whether the next reply thinks, and its budget, in one word."""
    settings = chat.settings
    if settings["think"] is False:
        return "think:off"
    budget = settings["thinking_budget"]
    by_default = chat.model.thinks_by_default if chat.model else True
    on = settings["think"] or by_default
    return f"think:{budget}" if budget is not None else f"think:{'on' if on else 'off'}"
