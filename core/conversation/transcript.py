"""A conversation as a tree of exact ids: what people said, as the template has it, and what the model said.

An `Input` holds one or more messages up to the moment the assistant may speak; an `Output` holds the ids that
were generated after it. Ids are never made again from text: decode and encode do not give them back.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from ..errors import TemplateError
from ..text.reply_parser import ReplyParser, leaves_thought_open
from ..text.template import Template
from ..text.tokenizer import Tokenizer

History = Literal["preserve", "strip"]
# stands for an assistant's words while the template's text around them is found; private use, so never typed
SENTINEL = "\ue000\ue001qchat\ue001\ue000"
_numbers = count(1)


def next_number() -> int:
    """For a node; no two of a process are equal."""
    return next(_numbers)


@dataclass(eq=False)
class Input:
    """Messages from outside; `ids` go up to where a thought would open, as the template wrote them with
    `switches`."""

    parent: "Output | None"
    messages: list[dict[str, Any]]
    ids: list[int]
    switches: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    number: int = field(default_factory=next_number)

    @property
    def asks(self) -> bool:
        """A question of the user's, not the results of a tool."""
        return any(message["role"] == "user" for message in self.messages)

    @property
    def text(self) -> str:
        """What was asked, or what the tools returned."""
        last = self.messages[-1]["role"]
        return "\n".join(str(m["content"]) for m in self.messages if m["role"] == last)


@dataclass(eq=False)
class Output:
    """One reply: the template's `opener` before it (a think opener, say), and the generated `ids`.

    `settings` are those it was asked for with, `stats` what of its `Done` is kept.
    """

    parent: Input
    opener: list[int]
    ids: list[int] = field(default_factory=list)
    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": ""})
    settings: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    number: int = field(default_factory=next_number)


Node = Input | Output


def branch(leaf: Node | None) -> list[Node]:
    """From the first input to `leaf`."""
    nodes: list[Node] = []
    while leaf is not None:
        nodes.append(leaf)
        leaf = leaf.parent
    return nodes[::-1]


def message_of(text: str, thought: str, calls: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """An assistant's message; `calls` are objects with name and arguments."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in calls]
    return message


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The message's tool calls as objects with name and arguments."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or []]
    return [{"name": f["name"], "arguments": f.get("arguments") or {}} for f in functions]


def messages_of(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    return [m for node in nodes for m in (node.messages if isinstance(node, Input) else [node.message])]


@dataclass(frozen=True)
class Prompt:
    """What the template wrote for the newest messages: `ids`, then the `opener` of the reply."""

    ids: list[int]
    opener: list[int]


class Author:
    """Writes the template's part of a conversation as ids."""

    def __init__(self, template: Template, tokenizer: Tokenizer):
        self.template, self.tokenizer = template, tokenizer
        self.end = tokenizer.token_id("<|im_end|>")

    def prompt(
        self, before: Sequence[Node], messages: list[dict[str, Any]], switches: Mapping[str, Any]
    ) -> Prompt:
        """The ids that `messages` add after `before`, and the opener of the reply to them.

        Raises TemplateError where the template refuses the messages.
        """
        ids = self.tokenizer.encode(self._suffix(before, messages, switches))
        if before and ids and ids[0] == self.end:
            ids = ids[1:]  # the end of the reply before, which that reply holds itself
        opening = self.tokenizer.think_open_id
        cut = len(ids)
        if opening is not None and opening in ids:
            cut = len(ids) - 1 - ids[::-1].index(opening)
            # a thought that stands in a message is closed by the turn's end; the reply's opener is not
            cut = cut if self.end not in ids[cut:] else len(ids)
        return Prompt(ids[:cut], ids[cut:])

    def _suffix(
        self, before: Sequence[Node], messages: list[dict[str, Any]], switches: Mapping[str, Any]
    ) -> str:
        """The text after the last reply: found behind a sentinel that stands for it, so that no form of the
        history, with thoughts or without, matters."""
        history = messages_of(before)
        if history:
            history[-1] = {"role": "assistant", "content": SENTINEL}
        text = self.render([*history, *messages], switches)
        if not history:
            return text
        _, found, suffix = text.rpartition(SENTINEL)
        if not found:
            raise TemplateError(f"{self.template.origin}: the template drops the assistant's words")
        return suffix

    def render(self, messages: Sequence[Mapping[str, Any]], switches: Mapping[str, Any]) -> str:
        """The whole prompt as text; what looks like a special token in people's words stays text."""
        shielded = [self._shielded(m) for m in messages]
        return self.template.render(shielded, add_generation_prompt=True, **switches)

    def _shielded(self, message: Mapping[str, Any]) -> dict[str, Any]:
        texts = {name: message.get(name) for name in ("content", "reasoning_content")}
        shielded = {n: self.tokenizer.shield(t) for n, t in texts.items() if isinstance(t, str)}
        calls = message.get("tool_calls")
        return {**message, **shielded, **({"tool_calls": self._shielded_calls(calls)} if calls else {})}

    def _shielded_calls(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.tokenizer.shield(value)
        if isinstance(value, list):
            return [self._shielded_calls(item) for item in value]
        if isinstance(value, dict):
            return {name: self._shielded_calls(item) for name, item in value.items()}
        return value

    def reply(
        self, node: Input, opener: Sequence[int], message: Mapping[str, Any], switches: Mapping[str, Any]
    ) -> list[int]:
        """A reply that somebody wrote, as ids after `opener` and without the end of its turn; special tokens
        in its words are text. Tool calls are written as the template writes them."""
        tokenizer, content = self.tokenizer, str(message["content"])
        thought, close = message.get("reasoning_content"), tokenizer.think_close_id
        calls = self._calls(node, message, switches)
        if not thought or close is None:
            return [*tokenizer.encode(content, special=False), *calls]
        opened = leaves_thought_open(opener, tokenizer)
        begin = [] if opened else [tokenizer.think_open_id, *tokenizer.encode("\n", special=False)]
        inside = tokenizer.encode(f"{thought}\n", special=False)
        return [*begin, *inside, close, *tokenizer.encode(f"\n\n{content}", special=False), *calls]

    def _calls(self, node: Input, message: Mapping[str, Any], switches: Mapping[str, Any]) -> list[int]:
        if not message.get("tool_calls"):
            return []
        said = {**message, "content": SENTINEL, "reasoning_content": ""}
        text = self.render([*messages_of([node]), said], switches).rpartition(SENTINEL)[2]
        ids = self.tokenizer.encode(text if message["content"] else text.lstrip())
        return ids[: ids.index(self.end)] if self.end in ids else []

    def message(self, opener: Sequence[int], ids: Sequence[int]) -> dict[str, Any]:
        """The message that generated `ids` are; a tool call among them stays text."""
        parser = ReplyParser(self.tokenizer, inside=leaves_thought_open(opener, self.tokenizer))
        ended = bool(ids) and ids[-1] in self.tokenizer.stop_ids
        pieces = [piece for id in ids[: len(ids) - ended] for piece in parser.add(id)]
        pieces += parser.flush()
        thought, text = ("".join(t for kind, t in pieces if kind == k) for k in ("thought", "text"))
        return message_of(text, thought)

    def disagreement(self, nodes: Sequence[Node], switches: Mapping[str, Any]) -> str | None:
        """Where the exact ids say something else than the rendered conversation, apart from white space and
        thoughts; None where they agree."""
        said = (node.ids if isinstance(node, Input) else self.visible(node) for node in nodes)
        ours = "".join("".join(map(self.tokenizer.decode, said)).split())
        written = self.tokenizer.encode(self.render(messages_of(nodes), switches))
        theirs = "".join(self.tokenizer.decode(self._without_thoughts(written)).split())
        if ours == theirs:
            return None
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        return f"{ours[place : place + 40]!r} where the template writes {theirs[place : place + 40]!r}"

    def _without_thoughts(self, ids: Sequence[int]) -> list[int]:
        kept, inside = [], False
        for token in ids:
            inside = inside or token == self.tokenizer.think_open_id
            if not inside:
                kept.append(token)
            inside = inside and token != self.tokenizer.think_close_id
        return kept

    def closed(self, output: Output) -> list[int]:
        """The reply's generated ids with the end of turn that a cancelled or cut one lacks."""
        done = self.end is None or (output.ids and output.ids[-1] in self.tokenizer.stop_ids)
        return output.ids if done else [*output.ids, self.end]  # pyright: ignore[reportReturnType]

    def visible(self, output: Output) -> list[int]:
        """The closed reply without its thoughts and their delimiters."""
        ids = [*output.opener, *self.closed(output)]
        close, end = self.tokenizer.think_close_id, self.end
        if close in ids:
            ids = ids[len(ids) - ids[::-1].index(close) :]
            while ids and not self.tokenizer.decode(ids[:1]).strip() and ids[0] != end:
                ids = ids[1:]
            return ids
        if self.tokenizer.think_open_id in ids:  # the thought never ended
            return [end] if end is not None else []
        return ids

    def ids(self, nodes: Sequence[Node], history: History) -> list[int]:
        """The exact ids of a branch; in `strip` replies before the last question are without thoughts."""
        return [token for piece in self.pieces(nodes, history) for token in piece]

    def pieces(self, nodes: Sequence[Node], history: History) -> Iterator[list[int]]:
        """The ids of each node, in the form that `history` gives it."""
        last = max((i for i, node in enumerate(nodes) if isinstance(node, Input) and node.asks), default=0)
        for i, node in enumerate(nodes):
            if isinstance(node, Input):
                yield node.ids
            elif history == "strip" and i < last:
                yield self.visible(node)
            elif i + 1 < len(nodes):
                yield [*node.opener, *self.closed(node)]
            else:
                yield [*node.opener, *node.ids]
