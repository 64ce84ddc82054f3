"""Histories that a caller gives: how later turns read them, and their questions and replies in turn."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from ..errors import UsageError
from .transcript import History

Message = dict[str, Any]


def split_history(
    messages: Sequence[dict[str, Any]],
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Yield each reply of a given history, after the messages that it answers.

    Raises UsageError where questions and replies do not alternate.
    """
    waiting: list[Message] = []
    for message in messages:
        if message["role"] != "assistant":
            waiting.append(message)
            continue
        if not waiting:
            raise UsageError("the given history has a reply that follows no question")
        yield waiting, message
        waiting = []
    if waiting:
        raise UsageError("the given history must end with an assistant's message")


def check_history(mode: Any) -> History:
    """Return `mode`, if it is a history mode. Raises UsageError."""
    if mode not in get_args(History):
        raise UsageError(f"history is {mode!r}, wanted {' or '.join(get_args(History))}")
    return mode
