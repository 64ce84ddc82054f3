"""A conversation as the front end holds it: plain turns, in the form of the engine's own account of them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from .client import Events

NO_STATE: Mapping[str, Any] = {
    "conversation": None,
    "title": "",
    "system": None,
    "history": "preserve",
    "tokens": 0,
    "context_limit": 0,
    "leaf": None,
    "turns": [],
    "branches": [],
}


def new_turn(number: int, question: str) -> dict[str, Any]:
    """A turn of which there is only the question."""
    return {
        "number": number,
        "role": "user",
        "question": question,
        "thinking": "",
        "answer": "",
        "tool_calls": [],
        "finish_reason": "",
        "node": None,
        "siblings": [],
        "stats": {},
        "seconds_thinking": 0.0,
        "created": time.time(),
    }


def collect(turn: dict[str, Any], batch: Events) -> None:
    """Write what was said into a turn that the engine has not closed yet."""
    for event in batch:
        match event.get("event"):
            case "thought":
                turn["thinking"] += event["text"]
            case "text":
                turn["answer"] += event["text"]
            case "tooluse":
                turn["tool_calls"].append({"name": event["name"], "arguments": event["arguments"]})
            case "done":
                turn["done"] = event


def said(turn: Mapping[str, Any]) -> bool:
    """Whether there is anything of an answer."""
    return bool(spoken(turn) or turn["tool_calls"])


def spoken(turn: Mapping[str, Any]) -> str:
    """Thought and answer."""
    return turn["thinking"] + turn["answer"]


def kept_settings(state: Mapping[str, Any], number: int | None) -> dict[str, Any]:
    """What stands over the settings for a newly loaded model: a stored conversation brings its own."""
    if number is not None:
        return {"system": None, "history": None}
    kept = {"system": state["system"]} if state["system"] else {}
    return kept | ({"history": state["history"]} if state["turns"] else {})


def messages_of(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns for a model that has not held them; one without a word of answer cannot be gone on from."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if not said(turn):
            continue
        thought = {"reasoning_content": turn["thinking"]} if turn["thinking"] else {}
        messages.append({"role": "user", "content": turn["question"]})
        messages.append({"role": "assistant", "content": turn["answer"], **thought})
    return messages
