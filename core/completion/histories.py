"""The messages of stateless requests as nodes of exact ids.

A reply that comes back as history gets the ids that were generated, its thought included, also where the
client left that out: text does not encode to the ids it was decoded from. Replies written elsewhere are
encoded once. All are found by content, so requests, branches and edits share what they have in common.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..conversation.encoder import Encoder
from ..conversation.transcript import Input, Node, Output, branch, tool_calls_of

# ids of the replies that are remembered, and of the questions before them
MAX_IDS = 1 << 20

Message = Mapping[str, Any]


@dataclass(frozen=True)
class _Exchange:
    """The messages before a reply, and the reply."""

    question: list[dict[str, Any]]
    answer: dict[str, Any]


class Histories:
    """Turns histories into nodes, and remembers the replies among them, the latest used last."""

    def __init__(self, encoder: Encoder, max_ids: int = MAX_IDS):
        self._encoder, self._max_ids = encoder, max_ids
        self._replies: OrderedDict[bytes, Output] = OrderedDict()
        self._count = 0

    def next_reply(self, messages: Sequence[Message], switches: Mapping[str, Any]) -> Output:
        """Return the reply that follows arranged `messages`, without ids, on a branch of their nodes.

        Where the messages end with the assistant's words, the reply, which has them as its message, continues
        them. Raises TemplateError where the template refuses the messages.
        """
        exchanges, rest = _split(messages)
        if not all(exchange.question for exchange in exchanges):  # the assistant speaks first
            return self._open(None, [dict(message) for message in messages], switches)
        begun = exchanges.pop() if exchanges and not rest else None
        parent: Output | None = None
        for exchange in exchanges:
            parent = self._find_or_encode(parent, exchange, switches)
        if begun is None:
            return self._open(parent, rest, switches)
        output = self._open(parent, begun.question, {**switches, "enable_thinking": False})
        words = self._encoder.encode_reply(output.parent, output.opener, begun.answer, switches)
        output.opener, output.message = [*output.opener, *words], begun.answer
        return output

    def remember(self, output: Output, begun: str = "") -> None:
        """Keep a finished reply for the requests that bring it as history; `begun` are words it continued."""
        message = {**output.message, "content": begun + output.message["content"]}
        switches, question = output.parent.switches, output.parent.messages
        for variant in (message, _without_thought(message)):
            self._keep(_key(output.parent.parent, switches, _Exchange(question, variant)), output)

    def _find_or_encode(
        self, parent: Output | None, exchange: _Exchange, switches: Mapping[str, Any]
    ) -> Output:
        key = _key(parent, switches, exchange)
        found = self._replies.get(key)
        if found is not None:
            self._replies.move_to_end(key)
            return found
        thinking = bool(exchange.answer.get("reasoning_content"))
        output = self._open(parent, exchange.question, {**switches, "enable_thinking": thinking})
        output.ids = self._encoder.encode_reply(
            output.parent, output.opener, exchange.answer, output.parent.switches
        )
        output.message = exchange.answer
        self._keep(key, output)
        return output

    def _open(
        self, parent: Output | None, question: list[dict[str, Any]], switches: Mapping[str, Any]
    ) -> Output:
        """Encode a question and the opener of the reply to it."""
        prompt = self._encoder.encode_prompt(_context(parent), question, switches)
        pictures = self._encoder.pictures_of(question)
        return Output(Input(parent, question, prompt.ids, dict(switches), pictures=pictures), prompt.opener)

    def _keep(self, key: bytes, output: Output) -> None:
        self._forget(key)
        self._replies[key] = output
        self._count += _size(output)
        while self._count > self._max_ids and len(self._replies) > 1:
            self._forget(next(iter(self._replies)))

    def _forget(self, key: bytes) -> None:
        if (output := self._replies.pop(key, None)) is not None:
            self._count -= _size(output)


def _split(messages: Sequence[Message]) -> tuple[list[_Exchange], list[dict[str, Any]]]:
    """Return the exchanges, and the messages after the last reply. A system message asks nothing."""
    exchanges: list[_Exchange] = []
    waiting: list[dict[str, Any]] = []
    for message in map(dict, messages):
        if message["role"] != "assistant":
            waiting.append(message)
            continue
        asked = any(other["role"] != "system" for other in waiting)
        exchanges.append(_Exchange(waiting if asked else [], message))
        waiting = []
    return exchanges, waiting


def _context(parent: Output | None) -> list[Node]:
    """Return enough of the history for the template to write what follows: first question and last reply."""
    return [branch(parent)[0], parent] if parent else []


def _key(parent: Output | None, switches: Mapping[str, Any], exchange: _Exchange) -> bytes:
    """Return the digest by which a reply is found: of its parent, or the switches, and of the exchange."""
    root = {name: value for name, value in switches.items() if name != "enable_thinking"}
    begin = parent.number if parent else root
    found = [begin, [_content(m) for m in exchange.question], _content(exchange.answer)]
    return hashlib.blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=16).digest()


def _content(message: Message) -> list[Any]:
    """Return what distinguishes a message from others; clients trim white space around the words."""
    calls = tool_calls_of(message)
    thought = (message.get("reasoning_content") or "").strip()
    shown = [[image["digest"], image["rows"], image["columns"]] for image in message.get("images", ())]
    return [message["role"], message["content"].strip(), thought, calls, *shown]


def _without_thought(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "reasoning_content"}


def _size(output: Output) -> int:
    return len(output.opener) + len(output.ids) + len(output.parent.ids)
