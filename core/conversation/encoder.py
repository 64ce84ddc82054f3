"""Conversation nodes as token ids: the template's text around messages, and the exact ids of a branch.

What looks like a special token in a message stays text. Raises TemplateError where the template refuses the
messages or drops the assistant's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ContextLengthExceeded, TemplateError
from ..text.reply_parser import ReplyParser, ThinkSplitter, leaves_thought_open
from ..text.template import Template
from ..text.tokenizer import Tokenizer
from ..vision.images import Images
from ..vision.placement import PlacedPicture
from .pictures import take_pictures, with_parts
from .transcript import (
    History,
    Input,
    Node,
    Output,
    assistant_message,
    branch,
    messages_of,
    tool_calls_of,
)

# replaces an assistant's words to find the template's text around them; private use, so never typed
SENTINEL = "\ue000\ue001qchat\ue001\ue000"


@dataclass(frozen=True)
class Prompt:
    """The template's ids for the newest messages, then the `opener` of the reply."""

    ids: list[int]
    opener: list[int]


class Encoder:
    """Encodes one model's conversations; holds nothing but its template and tokenizer."""

    def __init__(self, template: Template, tokenizer: Tokenizer, images: Images | None = None):
        """`images` has the pictures of messages."""
        self.template, self.tokenizer, self.images = template, tokenizer, images
        self.end = tokenizer.token_id("<|im_end|>")

    def encode_prompt(
        self, before: Sequence[Node], messages: list[dict[str, Any]], switches: Mapping[str, Any]
    ) -> Prompt:
        """Encode what `messages` add after `before`, and the opener of the reply to them.

        Raises TemplateError where the template refuses the messages.
        """
        ids = self.tokenizer.encode(self._suffix(before, messages, switches))
        ids = self._place_pictures(ids, messages)
        if before and ids and ids[0] == self.end:
            ids = ids[1:]  # the previous reply holds its own end of turn
        opening = self.tokenizer.think_open_id
        cut = len(ids)
        if opening is not None and opening in ids:
            cut = len(ids) - 1 - ids[::-1].index(opening)
            # a thought inside a message is closed by the turn's end; the reply's opener is not
            cut = cut if self.end not in ids[cut:] else len(ids)
        return Prompt(ids[:cut], ids[cut:])

    def _place_pictures(self, ids: list[int], messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Put the ids of the messages' pictures in place of those that the template writes for them.

        Raises TemplateError where it writes none, UsageError for a picture that nobody holds.
        """
        pictures = self.pictures_of(messages)
        if self.images is None or not pictures:
            return ids
        pad, waiting = self.images.pad_id, iter(pictures)
        if ids.count(pad) != len(pictures):
            raise TemplateError(f"{self.template.origin}: the template has no place for pictures")
        return [one for id in ids for one in (next(waiting).ids if id == pad else (id,))]

    def pictures_of(self, messages: Sequence[Mapping[str, Any]]) -> list[PlacedPicture]:
        """Return the pictures of `messages`. Raises UsageError for one that nobody holds."""
        return take_pictures(messages, self.images) if self.images else []

    def refuse_too_long(self, messages: Sequence[Mapping[str, Any]], limit: int) -> None:
        """Raise ContextLengthExceeded for a text far beyond `limit`, before all of it is encoded."""
        for message in messages:
            count = self.tokenizer.count_at_least(str(message.get("content")), limit)
            if count > limit:
                raise ContextLengthExceeded(count, limit)

    def _suffix(
        self, before: Sequence[Node], messages: list[dict[str, Any]], switches: Mapping[str, Any]
    ) -> str:
        """Return the text after the last reply.

        A sentinel replaces that reply, so it does not matter whether the history keeps thoughts.
        """
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
        """Render the whole prompt as text, with special tokens inside messages and tools shielded."""
        try:
            shielded = self._shield({"messages": [*map(with_parts, messages)], **switches})
        except RecursionError as problem:
            raise TemplateError("the messages or tools nest too deeply") from problem
        return self.template.render(shielded.pop("messages"), add_generation_prompt=True, **shielded)

    def _shield(self, value: Any) -> Any:
        """Shield every text in `value`, the names in objects included: all of it comes from outside."""
        if isinstance(value, str):
            return self.tokenizer.shield(value)
        if isinstance(value, Mapping):
            return {self._shield(name): self._shield(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._shield(item) for item in value]
        return value

    def encode_reply(
        self, node: Input, opener: Sequence[int], message: Mapping[str, Any], switches: Mapping[str, Any]
    ) -> list[int]:
        """Encode a reply written elsewhere, without its end of turn; it follows `opener`.

        Special tokens in its words are text. Tool calls are written as the template writes them.
        """
        tokenizer, content = self.tokenizer, str(message["content"])
        thought, close = message.get("reasoning_content"), tokenizer.think_close_id
        calls = self._encode_calls(node, message, switches)
        if not thought or close is None:
            return [*tokenizer.encode(content, special=False), *calls]
        opened = leaves_thought_open(opener, tokenizer)
        begin = [] if opened else [tokenizer.think_open_id, *tokenizer.encode("\n", special=False)]
        inside = tokenizer.encode(f"{thought}\n", special=False)
        return [*begin, *inside, close, *tokenizer.encode(f"\n\n{content}", special=False), *calls]

    def _encode_calls(
        self, node: Input, message: Mapping[str, Any], switches: Mapping[str, Any]
    ) -> list[int]:
        if not message.get("tool_calls"):
            return []
        marked = {**message, "content": SENTINEL, "reasoning_content": ""}
        text = self.render([*messages_of([node]), marked], switches).rpartition(SENTINEL)[2]
        ids = self.tokenizer.encode(text if message["content"] else text.lstrip())
        return ids[: ids.index(self.end)] if self.end in ids else []

    def decode_message(self, opener: Sequence[int], ids: Sequence[int]) -> dict[str, Any]:
        """Decode generated `ids` to a message; a tool call among them stays text."""
        parser = ReplyParser(self.tokenizer, inside=leaves_thought_open(opener, self.tokenizer))
        ended = bool(ids) and ids[-1] in self.tokenizer.stop_ids
        pieces = [piece for id in ids[: len(ids) - ended] for piece in parser.add(id)]
        pieces += parser.flush()
        thought, text = ("".join(t for kind, t in pieces if kind == k) for k in ("thought", "text"))
        return assistant_message(text, thought)

    # the ids of a branch

    def branch_ids(self, nodes: Sequence[Node], history: History) -> list[int]:
        """Return the exact ids of a branch; `strip` leaves the thoughts out of replies before the last
        question."""
        return [token for piece in self.node_ids(nodes, history) for token in piece]

    def node_ids(self, nodes: Sequence[Node], history: History) -> Iterator[list[int]]:
        """Yield the ids of each node of a branch in the form that `history` asks for."""
        questions = (i for i, node in enumerate(nodes) if isinstance(node, Input) and node.is_question)
        last = max(questions, default=0)
        for i, node in enumerate(nodes):
            if isinstance(node, Input):
                yield node.ids
            elif history == "strip" and i < last:
                yield self.ids_without_thoughts(node)
            elif i + 1 < len(nodes):
                yield [*node.opener, *self.closed_ids(node)]
            else:
                yield [*node.opener, *node.ids]

    def closed_ids(self, output: Output) -> list[int]:
        """Return the reply's generated ids, with the end of turn that a cancelled or cut reply lacks."""
        done = self.end is None or (output.ids and output.ids[-1] in self.tokenizer.stop_ids)
        return output.ids if done else [*output.ids, self.end]  # pyright: ignore[reportReturnType]

    def ids_without_thoughts(self, output: Output) -> list[int]:
        """Return the closed reply without its thoughts and their delimiters."""
        ids, end = [*output.opener, *self.closed_ids(output)], self.end
        splitter = ThinkSplitter(self.tokenizer.think_open_id, self.tokenizer.think_close_id, inside=False)
        kept = [token for token in ids if splitter.add(token) == "text"]
        if splitter.inside and end is not None:  # the thought never ended
            kept.append(end)
        while kept and not self.tokenizer.decode(kept[:1]).strip() and kept[0] != end:
            kept = kept[1:]
        return kept

    # exact ids compared with the template

    def ids_before_next(self, leaf: Output, history: History) -> list[int]:
        """Return the ids that any next message, a question or the results of tools, will begin with."""
        role = "tool" if tool_calls_of(leaf.message) else "user"
        following = Input(leaf, [{"role": role, "content": ""}], [])
        return self.branch_ids([*branch(leaf), following], history)

    def find_disagreement(self, nodes: Sequence[Node]) -> str | None:
        """Find where the exact ids differ from the rendered conversation, white space and thoughts aside.

        Returns None where they agree. Renders and encodes the whole branch: not for the path of a reply.
        """
        exact = (node.ids if isinstance(node, Input) else self.ids_without_thoughts(node) for node in nodes)
        ours = "".join("".join(map(self.tokenizer.decode, exact)).split())
        switches = nodes[0].switches if isinstance(nodes[0], Input) else {}
        written = self.tokenizer.encode(self.render(messages_of(nodes), switches))
        theirs = "".join(self.tokenizer.decode(self._drop_thoughts(written)).split())
        if ours == theirs:
            return None
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        return f"{ours[place : place + 40]!r} where the template writes {theirs[place : place + 40]!r}"

    def _drop_thoughts(self, ids: Sequence[int]) -> list[int]:
        kept, inside = [], False
        for token in ids:
            inside = inside or token == self.tokenizer.think_open_id
            if not inside:
                kept.append(token)
            inside = inside and token != self.tokenizer.think_close_id
        return kept
