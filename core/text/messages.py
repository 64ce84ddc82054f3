"""Histories of other programs, arranged as chat templates want them.

Owns the order: one system message first, one assistant message between questions, the results of tools in
the order of their calls. Refuses what `check_messages` refuses, and an empty history.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import TemplateError, UsageError
from .template import check_messages

Message = dict[str, Any]


def arrange_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the history in the template's form. Raises TemplateError with one sentence."""
    checked = check_messages(messages)
    if not checked:
        raise TemplateError("there are no messages: a conversation has at least one")
    systems = [message for message in checked if message["role"] == "system"]
    rest = [message for message in checked if message["role"] != "system"]
    return [*_merge_systems(systems), *_order_results(_merge_assistants(rest))]


def pair_messages(messages: Sequence[Message]) -> Iterator[tuple[list[Message], Message]]:
    """Yield each assistant's message after the messages that it answers.

    Raises UsageError where questions and replies do not alternate, or a question ends the history.
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


def _merge_systems(systems: list[Message]) -> list[Message]:
    texts = [message["content"] for message in systems if message["content"].strip()]
    return [{"role": "system", "content": "\n\n".join(texts)}] if texts else []


def _merge_assistants(messages: list[Message]) -> list[Message]:
    """Join assistant messages that follow each other, as when text and calls come separately."""
    merged: list[Message] = []
    for message in messages:
        if message["role"] == "assistant" and merged and merged[-1]["role"] == "assistant":
            merged[-1] = _join(merged[-1], message)
        else:
            merged.append(message)
    return merged


def _join(first: Message, second: Message) -> Message:
    joined: Message = {"role": "assistant", "content": _join_texts(first["content"], second["content"])}
    thoughts = [m["reasoning_content"] for m in (first, second) if m.get("reasoning_content")]
    calls = [call for m in (first, second) for call in m.get("tool_calls") or []]
    joined |= {"reasoning_content": "\n\n".join(thoughts)} if thoughts else {}
    return joined | ({"tool_calls": calls} if calls else {})


def _join_texts(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _order_results(messages: list[Message]) -> list[Message]:
    """Put the results of tools directly after the calls they answer, in the order of those."""
    owners: dict[str, list[int]] = {}
    for place, message in enumerate(messages):
        for call in message.get("tool_calls") or []:
            owners.setdefault(str(call.get("id")), []).append(place)
    results: dict[int, list[Message]] = {}
    kept: list[tuple[int, Message]] = []
    for place, message in enumerate(messages):
        is_result = message["role"] == "tool"
        owner = _owner(owners.get(_call_id(message), [place]), place) if is_result else place
        if owner != place:
            results.setdefault(owner, []).append(message)
        else:
            kept.append((place, message))
    ordered: list[Message] = []
    for place, message in kept:
        order = {str(call.get("id")): n for n, call in enumerate(message.get("tool_calls") or [])}
        answers = sorted(results.get(place, []), key=lambda result: order[_call_id(result)])
        ordered += [message, *answers]
    return ordered


def _call_id(message: Message) -> str:
    return str(message.get("tool_call_id"))


def _owner(places: list[int], result: int) -> int:
    """Return which of the `places` of calls with one id a result belongs to: the last before it, if any."""
    return max((place for place in places if place < result), default=places[0])
