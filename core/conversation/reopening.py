"""Rebuilds a session's tree from a stored conversation, with its exact ids where they are still valid.

Stored ids are not trusted: those of another tokenizer or template, of an imported file, or outside the
vocabulary are encoded again from the messages. Refuses trees that no conversation produces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from ..engine.engine import Engine
from ..errors import QchatError, StoreError
from ..storage.records import Conversation, ModelIdentity, NodeContent
from ..storage.records import Node as Stored
from ..text.template import separate_thought
from ..vision.images import Images
from ..vision.picture import Picture
from ..vision.pixels import Grid
from ..vision.placement import PlacedPicture, is_image
from .encoder import Encoder
from .transcript import History, Input, Node, Output, assistant_message

# the most messages that one reply answers; a file that claims more was made by hand
MAX_MESSAGES = 1000
DAMAGED = "this conversation's stored tokens are damaged"
NO_FILES: Mapping[str, bytes] = {}


@dataclass
class StoredTree:
    """A stored conversation as nodes, last held with `model`.

    `message_ids` are ids in the store by node number. `changes` are corrections to stored messages, to be
    written when the conversation continues.
    """

    nodes: list[Node] = field(default_factory=list)
    leaf: Output | None = None
    message_ids: dict[int, int] = field(default_factory=dict)
    changes: dict[int, NodeContent] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    model: ModelIdentity | None = None


def stored_options(about: Conversation) -> dict[str, Any]:
    """Return the options that a session of the stored conversation begins with.

    An imported conversation brings no tools.
    """
    options: dict[str, Any] = {"system": about.system or None}
    if about.settings.get("history") in get_args(History):
        options["history"] = about.settings["history"]
    if about.settings.get("tools") and not about.imported:
        options["tools"] = about.settings["tools"]
    return options


def rebuild_tree(
    about: Conversation,
    stored: Sequence[Stored],
    engine: Engine,
    switches: Mapping[str, Any],
    files: Mapping[str, bytes] = NO_FILES,
) -> StoredTree:
    """Rebuild the tree of `stored`, parents first; `switches` serve for ids that are encoded again.

    `files` are its pictures by digest; all are left out where the model sees none or one is missing. Raises
    StoreError for something that is not a tree, TemplateError where the template refuses a message.
    """
    model, encoder = engine.identity, Encoder(engine.template, engine.tokenizer, engine.images)
    pictures, trouble = _find_pictures(stored, files, engine.images)
    why = trouble or _why_ids_are_invalid(about, stored, model, engine.config.vocab_size)
    same_tokens = model.tokenizer_hash == about.model.tokenizer_hash
    vocab_size = engine.config.vocab_size if same_tokens else 0
    id_source = _EncodedIds(encoder, switches, vocab_size) if why else _StoredIds()
    tree = _Builder(stored, encoder, id_source, pictures).build(about)
    if not why and not all(_shows_its_pictures(node) for node in tree.nodes):
        why, id_source = DAMAGED, _EncodedIds(encoder, switches, vocab_size)
        tree = _Builder(stored, encoder, id_source, pictures).build(about)
    if why and tree.nodes:
        tree.notices.insert(0, f"{why}: its messages were encoded again, and are read anew")
        tree.changes = _contents(tree) | tree.changes
    return tree


def _why_ids_are_invalid(
    about: Conversation, stored: Sequence[Stored], model: ModelIdentity, vocab_size: int
) -> str | None:
    """Return why stored ids cannot be used as they are; None where they can."""
    if about.imported:
        return "this conversation was imported"
    for name in ("tokenizer", "template"):
        if getattr(about.model, f"{name}_hash") != getattr(model, f"{name}_hash"):
            return f"this conversation was held with another {name}, {about.model.name or 'unnamed'}'s"
    if any(
        token >= vocab_size and not (is_image(token) and node.role != "assistant")
        for node in stored
        for token in (*node.opener, *node.ids)
    ):
        return DAMAGED
    return None


def _find_pictures(
    stored: Sequence[Stored], files: Mapping[str, bytes], images: Images
) -> tuple[dict[int, list[PlacedPicture]], str]:
    """Return the pictures of each message by its id, or none and the reason for it."""
    found: dict[int, list[PlacedPicture]] = {}
    known: dict[str, Picture] = {}
    try:
        for node in stored:
            for image in node.images:
                if image["digest"] not in files:
                    raise StoreError("a picture of this conversation is missing or damaged in the store")
                picture = Picture(files[image["digest"]], image["name"])
                picture = known.setdefault(image["digest"], picture)
                placed = images.place_again(picture, Grid(image["rows"], image["columns"]))
                found.setdefault(node.id, []).append(placed)
    except QchatError as error:
        return {}, f"{error}, so its pictures are left out"
    return found, ""


def _shows_its_pictures(node: Node) -> bool:
    """Whether the ids of a node hold exactly its pictures."""
    if isinstance(node, Output):
        return True
    wanted = [id for placed in node.pictures for id in placed.ids]
    return wanted == [id for id in node.ids if is_image(id)]


class _StoredIds:
    """Takes ids as they were stored."""

    def question(self, node: Input, last: Stored) -> None:
        node.ids = last.ids
        switches = last.settings.get("switches")
        node.switches = switches if isinstance(switches, dict) else {}

    def reply(self, node: Output, stored: Stored) -> None:
        node.opener, node.ids = stored.opener, stored.ids


class _EncodedIds:
    """Encodes ids from messages; a reply keeps its own ids if they decode to exactly its message."""

    def __init__(self, encoder: Encoder, switches: Mapping[str, Any], vocab_size: int):
        """`vocab_size` is 0 where stored ids belong to another tokenizer."""
        self.encoder, self.switches, self.vocab_size = encoder, dict(switches), vocab_size
        self.first_inputs: dict[int, Input] = {}

    def question(self, node: Input, last: Stored) -> None:  # noqa: ARG002
        node.switches = self.switches
        parent = node.parent
        self.first_inputs[node.number] = self.first_inputs[parent.parent.number] if parent else node
        node.ids = self.encoder.encode_prompt(self._before(node), node.messages, self.switches).ids

    def reply(self, node: Output, stored: Stored) -> None:
        switches = self.switches | {"enable_thinking": "reasoning_content" in node.message}
        node.opener = self.encoder.encode_prompt(
            self._before(node.parent), node.parent.messages, switches
        ).opener
        if self._decodes_to_its_message(node, stored):
            node.ids = stored.ids
        else:
            node.ids = self.encoder.encode_reply(node.parent, node.opener, node.message, switches)

    def _before(self, node: Input) -> list[Node]:
        """Return enough of the history for the template to write `node`: first input and last reply."""
        return [self.first_inputs[node.number], node.parent] if node.parent else []

    def _decodes_to_its_message(self, node: Output, stored: Stored) -> bool:
        tokenizer = self.encoder.tokenizer
        body = stored.ids[:-1] if stored.ids and stored.ids[-1] in tokenizer.stop_ids else stored.ids
        return (
            bool(body)
            and max(stored.ids) < self.vocab_size
            and all(tokenizer.decode([token]) for token in body)  # a special token has no text
            and self.encoder.decode_message(node.opener, stored.ids) == node.message
        )


class _Builder:
    """Groups stored messages into nodes: the messages before a reply form one `Input`."""

    def __init__(
        self,
        stored: Sequence[Stored],
        encoder: Encoder,
        id_source: _StoredIds | _EncodedIds,
        pictures: Mapping[int, list[PlacedPicture]],
    ):
        self.stored, self.encoder, self.id_source, self.pictures = stored, encoder, id_source, pictures
        self.by_id = {node.id: node for node in stored}
        self.inputs: dict[int, Input] = {}
        self.outputs: dict[int, Output] = {}
        self.tree = StoredTree()
        self.imported = False

    def build(self, about: Conversation) -> StoredTree:
        self.imported, self.tree.model = about.imported, about.model
        for node in self.stored:
            if node.role == "assistant":
                self._reply(node)
        message_id = about.leaf
        while message_id is not None and message_id not in self.outputs:
            node = self.by_id[message_id]
            if node.role == "assistant" and node.state == "streaming":
                self._unanswered(node)
            message_id = node.parent
        self.tree.leaf = self.outputs[message_id] if message_id is not None else None
        return self.tree

    def _unanswered(self, node: Stored) -> None:
        asked = self.by_id[node.parent].text if node.parent is not None else ""
        self.tree.notices.append(
            f"the program ended before the question “{asked[:80]}” was answered: ask it again"
        )

    def _reply(self, stored: Stored) -> None:
        if not (stored.ids or stored.text or stored.thinking or stored.tool_calls):
            return  # no reply, so the question does not count as asked
        node = Output(self._input(stored), [], created=stored.created, model_name=stored.model_name)
        node.message = assistant_message(stored.text, stored.thinking, stored.tool_calls)
        if self.imported and stored.text.lstrip().startswith("<think>"):
            node.message = separate_thought(node.message)
        reason = {"finish_reason": "stop"} if stored.state == "complete" else {}
        node.settings, node.stats = stored.settings, reason | stored.stats
        self.id_source.reply(node, stored)
        if stored.state == "streaming":
            self._end_reply(node, stored)
        self.outputs[stored.id] = node
        self._add(node, stored)

    def _end_reply(self, node: Output, stored: Stored) -> None:
        """End a reply that is no longer being written; its ids may hold a little more than its text."""
        node.message = self.encoder.decode_message(node.opener, node.ids)
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
            raise StoreError(f"the stored conversation has a reply without a question, message {reply.id}")
        if reply.parent in self.inputs:
            return self.inputs[reply.parent]
        messages: list[Stored] = []
        message_id: int | None = reply.parent
        while (
            message_id is not None
            and self.by_id[message_id].role != "assistant"
            and len(messages) < MAX_MESSAGES
        ):
            messages.append(self.by_id[message_id])
            message_id = messages[-1].parent
        if message_id is not None and message_id not in self.outputs:
            raise StoreError(f"the stored conversation lacks the message before message {messages[-1].id}")
        parent = self.outputs[message_id] if message_id is not None else None
        given = [self._message(node) for node in reversed(messages)]
        shown = [placed for node in reversed(messages) for placed in self.pictures.get(node.id, ())]
        node = Input(parent, given, [], created=messages[0].created, pictures=shown)
        self.id_source.question(node, messages[0])
        self.inputs[reply.parent] = node
        self._add(node, messages[0])
        return node

    def _message(self, node: Stored) -> dict[str, Any]:
        images = {"images": node.images} if node.id in self.pictures else {}
        return {"role": node.role, "content": node.text, **images}

    def _add(self, node: Node, stored: Stored) -> None:
        self.tree.nodes.append(node)
        self.tree.message_ids[node.number] = stored.id


def _contents(tree: StoredTree) -> dict[int, NodeContent]:
    """Return the ids of every message of the tree, by message id."""
    contents: dict[int, NodeContent] = {}
    for node in tree.nodes:
        content = NodeContent(ids=node.ids)
        if isinstance(node, Output):
            content["opener"] = node.opener
        elif node.parent is None:
            content["settings"] = {"switches": node.switches}
        contents[tree.message_ids[node.number]] = content
    return contents
