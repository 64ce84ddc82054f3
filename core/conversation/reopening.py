"""Takes a stored conversation back into a session's tree: exact ids where they are still this model's.

Whatever else is stored is only a claim: ids of another tokenizer or template, of an imported file, or outside
the vocabulary are made again from the messages. Refuses trees that no conversation makes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from ..engine.engine import Engine
from ..errors import StoreError
from ..storage.records import Conversation, ModelIdentity, NodeContent
from ..storage.records import Node as Stored
from .identity import identity_of
from .transcript import Author, History, Input, Node, Output, message_of

# one reply answers so many messages at most; a file that claims more was made by hand
MAX_MESSAGES = 1000


@dataclass
class Stock:
    """What was stored, as nodes; `places` are the stored ids by node number. `changes` is what the
    store should learn of its messages when the conversation goes on."""

    nodes: list[Node] = field(default_factory=list)
    leaf: Output | None = None
    places: dict[int, int] = field(default_factory=dict)
    changes: dict[int, NodeContent] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def kept_options(about: Conversation) -> dict[str, Any]:
    """What a session of the stored conversation begins with; of an imported one no tools are taken."""
    options: dict[str, Any] = {"system": about.system or None}
    if about.settings.get("history") in get_args(History):
        options["history"] = about.settings["history"]
    if about.settings.get("tools") and not about.imported:
        options["tools"] = about.settings["tools"]
    return options


def rebuild(
    about: Conversation, stored: Sequence[Stored], engine: Engine, switches: Mapping[str, Any]
) -> Stock:
    """The tree of `stored`, parents first, for `engine`; `switches` are for ids that must be made again.

    Raises StoreError for a tree that is none, TemplateError where the template refuses its messages.
    """
    model, author = identity_of(engine), Author(engine.template, engine.tokenizer)
    why = _why_not_ours(about, stored, model, engine.config.vocab_size)
    same_tokens = model.tokenizer_hash == about.model.tokenizer_hash
    vocab_size = engine.config.vocab_size if same_tokens else 0
    writer = _Authored(author, switches, vocab_size) if why else _AsStored()
    tree = _Builder(stored, author, writer).build(about)
    if why and tree.nodes:
        tree.notices.insert(0, f"{why}: its tokens were made again from its messages, and are read anew")
        tree.changes = _contents(tree) | tree.changes
    return tree


def _why_not_ours(
    about: Conversation, stored: Sequence[Stored], model: ModelIdentity, vocab_size: int
) -> str | None:
    """The reason for which stored ids cannot be taken as they are."""
    if about.imported:
        return "this conversation was imported"
    for name in ("tokenizer", "template"):
        if getattr(about.model, f"{name}_hash") != getattr(model, f"{name}_hash"):
            return f"this conversation was held with another {name}, {about.model.name or 'unnamed'}'s"
    if any(token >= vocab_size for node in stored for token in (*node.opener, *node.ids)):
        return "this conversation's stored tokens are damaged"
    return None


class _AsStored:
    """Ids as they were stored."""

    def question(self, node: Input, last: Stored) -> None:
        node.ids = last.ids
        switches = last.settings.get("switches")
        node.switches = switches if isinstance(switches, dict) else {}

    def reply(self, node: Output, stored: Stored) -> None:
        node.opener, node.ids = stored.opener, stored.ids


class _Authored:
    """Ids made from messages; a reply keeps its own where they say exactly what its message does."""

    def __init__(self, author: Author, switches: Mapping[str, Any], vocab_size: int):
        """`vocab_size` is 0 where stored ids are another tokenizer's."""
        self.author, self.switches, self.vocab_size = author, dict(switches), vocab_size
        self.beginnings: dict[int, Input] = {}

    def question(self, node: Input, last: Stored) -> None:  # noqa: ARG002
        node.switches = self.switches
        parent = node.parent
        self.beginnings[node.number] = self.beginnings[parent.parent.number] if parent else node
        node.ids = self.author.prompt(self._before(node), node.messages, self.switches).ids

    def reply(self, node: Output, stored: Stored) -> None:
        switches = self.switches | {"enable_thinking": "reasoning_content" in node.message}
        node.opener = self.author.prompt(self._before(node.parent), node.parent.messages, switches).opener
        if self._says_its_message(node, stored):
            node.ids = stored.ids
        else:
            node.ids = self.author.reply(node.parent, node.opener, node.message, switches)

    def _before(self, node: Input) -> list[Node]:
        """Enough of what precedes `node` for the template to write it: the beginning and the last reply."""
        return [self.beginnings[node.number], node.parent] if node.parent else []

    def _says_its_message(self, node: Output, stored: Stored) -> bool:
        tokenizer = self.author.tokenizer
        body = stored.ids[:-1] if stored.ids and stored.ids[-1] in tokenizer.stop_ids else stored.ids
        return (
            bool(body)
            and max(stored.ids) < self.vocab_size
            and all(tokenizer.decode([token]) for token in body)  # a special token has no text
            and self.author.message(node.opener, stored.ids) == node.message
        )


class _Builder:
    """Puts stored messages together: those up to where the assistant may speak are one `Input`."""

    def __init__(self, stored: Sequence[Stored], author: Author, writer: _AsStored | _Authored):
        self.stored, self.author, self.writer = stored, author, writer
        self.by_id = {node.id: node for node in stored}
        self.inputs: dict[int, Input] = {}
        self.outputs: dict[int, Output] = {}
        self.tree = Stock()

    def build(self, about: Conversation) -> Stock:
        for node in self.stored:
            if node.role == "assistant":
                self._reply(node)
        place = about.leaf
        while place is not None and place not in self.outputs:
            node = self.by_id[place]
            if node.role == "assistant" and node.state == "streaming":
                self._unanswered(node)
            place = node.parent
        self.tree.leaf = self.outputs[place] if place is not None else None
        return self.tree

    def _unanswered(self, node: Stored) -> None:
        asked = self.by_id[node.parent].text if node.parent is not None else ""
        self.tree.notices.append(
            f"the program ended before the question “{asked[:80]}” was answered: ask it again"
        )

    def _reply(self, stored: Stored) -> None:
        if not (stored.ids or stored.text or stored.thinking or stored.tool_calls):
            return  # nothing was said, so nothing was asked
        node = Output(self._input(stored), [], created=stored.created)
        node.message = message_of(stored.text, stored.thinking, stored.tool_calls)
        reason = {"finish_reason": "stop"} if stored.state == "complete" else {}
        node.settings, node.stats = stored.settings, reason | stored.stats
        self.writer.reply(node, stored)
        if stored.state == "streaming":
            self._end(node, stored)
        self.outputs[stored.id] = node
        self._add(node, stored)

    def _end(self, node: Output, stored: Stored) -> None:
        """Nobody is writing it any more; the ids may say a little more than the text does."""
        node.message = self.author.message(node.opener, node.ids)
        thought = node.message.get("reasoning_content", "")
        content = NodeContent(
            state="cancelled",
            text=node.message["content"],
            thinking=thought,
            ids=node.ids,
            opener=node.opener,
        )
        self.tree.changes[stored.id] = content

    def _input(self, reply: Stored) -> Input:
        if reply.parent is None or self.by_id[reply.parent].role == "assistant":
            raise StoreError(f"the stored conversation has a reply to nothing, message {reply.id}")
        if reply.parent in self.inputs:
            return self.inputs[reply.parent]
        messages: list[Stored] = []
        place: int | None = reply.parent
        while place is not None and self.by_id[place].role != "assistant" and len(messages) < MAX_MESSAGES:
            messages.append(self.by_id[place])
            place = messages[-1].parent
        if place is not None and place not in self.outputs:
            raise StoreError(f"the stored conversation goes on from nothing at message {messages[-1].id}")
        parent = self.outputs[place] if place is not None else None
        said = [{"role": node.role, "content": node.text} for node in reversed(messages)]
        node = Input(parent, said, [], created=messages[0].created)
        self.writer.question(node, messages[0])
        self.inputs[reply.parent] = node
        self._add(node, messages[0])
        return node

    def _add(self, node: Node, stored: Stored) -> None:
        self.tree.nodes.append(node)
        self.tree.places[node.number] = stored.id


def _contents(tree: Stock) -> dict[int, NodeContent]:
    """The ids of every message of the tree."""
    contents: dict[int, NodeContent] = {}
    for node in tree.nodes:
        content = NodeContent(ids=node.ids)
        if isinstance(node, Output):
            content["opener"] = node.opener
        elif node.parent is None:
            content["settings"] = {"switches": node.switches}
        contents[tree.places[node.number]] = content
    return contents
