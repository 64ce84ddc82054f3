"""Nodes of a conversation: exact ids of what the template wrote and of what the model generated.

An `Input` holds one or more messages, up to the point where the assistant speaks; an `Output` holds the ids
generated after it. Ids are never re-encoded from text, because decoding and encoding do not round-trip.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import UsageError
from ..quoting import quote_value

if TYPE_CHECKING:
    from ..vision.placement import PlacedPicture

History = Literal["preserve", "strip"]
_numbers = count(1)


def check_history(mode: Any) -> History:
    """Return `mode` if it is one. Raises UsageError."""
    if mode not in get_args(History):
        raise UsageError(f"history is {quote_value(mode)}, wanted {' or '.join(get_args(History))}")
    return mode


def next_number() -> int:
    """Return a node number that is unique in this process."""
    return next(_numbers)


@dataclass(eq=False)
class Input:
    """Messages from outside, whose `pictures` it holds.

    `ids` end where a thought would open, as the template wrote them with `switches`.
    """

    parent: "Output | None"
    messages: list[dict[str, Any]]
    ids: list[int]
    switches: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    number: int = field(default_factory=next_number)
    pictures: "Sequence[PlacedPicture]" = ()

    @property
    def is_question(self) -> bool:
        """Whether the user speaks here, rather than a tool."""
        return any(message["role"] == "user" for message in self.messages)

    @property
    def text(self) -> str:
        """The question, or the results that tools returned."""
        last = self.messages[-1]["role"]
        return "\n".join(str(m["content"]) for m in self.messages if m["role"] == last)


@dataclass(eq=False)
class Output:
    """One reply: the template's `opener` before it (a think opener, say), and the generated `ids`.

    `settings` are those of the request; `stats` are the parts of its `Done` that are kept. `model_name` names
    the model that wrote it, and is empty where that is unknown.
    """

    parent: Input
    opener: list[int]
    ids: list[int] = field(default_factory=list)
    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": ""})
    settings: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    number: int = field(default_factory=next_number)
    model_name: str = ""

    def copy_under(self, parent: Input) -> "Output":
        """Return the same reply to another input."""
        return replace(self, parent=parent, number=next_number())


Node = Input | Output


def branch(leaf: Node | None) -> list[Node]:
    """Return the nodes from the first input to `leaf`."""
    nodes: list[Node] = []
    while leaf is not None:
        nodes.append(leaf)
        leaf = leaf.parent
    return nodes[::-1]


def assistant_message(text: str, thought: str, calls: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Build an assistant's message; `calls` are objects with name and arguments."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in calls]
    return message


def tool_calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the message's tool calls as objects with name and arguments."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or []]
    return [{"name": f["name"], "arguments": f.get("arguments") or {}} for f in functions]


def messages_of(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Return the messages of `nodes` in the template's form."""
    return [m for node in nodes for m in (node.messages if isinstance(node, Input) else [node.message])]
