"""Persistence of one session: its tree in a store.

Maps nodes to messages of the store. Without a store nothing is kept. An error of the store becomes a notice,
once for as long as it lasts; the session continues, and the next turn writes what is missing.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..engine.engine import Engine
from ..errors import StoreError
from ..events import Done
from ..storage.records import ConversationContent, NodeContent, NodeDraft, NodeState
from ..storage.store import SAVE_PERIOD_SECONDS, Store, StreamWriter
from .reopening import StoredTree
from .transcript import Input, Node, Output, branch, tool_calls_of

COMPLETE = ("stop", "length")


class Recorder:
    """Records one session; `conversation` is its number in the store, None until there is a question."""

    def __init__(
        self,
        engine: Engine,
        store: Store | None,
        notices: list[str],
        conversation: int | None = None,
        stored: StoredTree | None = None,
    ):
        """`stored` is what the store holds of `conversation`.

        Appends a sentence to `notices` for what could not be kept.
        """
        self._store, self._engine, self._notices = store, engine, notices
        self.conversation = conversation
        self._title = ""
        self._trouble = ""
        self._message_ids = dict(stored.message_ids) if stored else {}  # by node number
        self._changes = dict(stored.changes) if stored else {}  # written when the conversation continues
        self._saved_about: dict[str, Any] = {}
        self._saved_model = stored.model if stored else None
        self._writer: StreamWriter | None = None
        self._stream_broken = False

    @property
    def title(self) -> str:
        """The stored title, which other processes may have changed; empty where there is none."""
        if self._store and self.conversation is not None:
            with suppress(StoreError):
                return self._store.conversation(self.conversation).title
        return self._title

    def rename(self, title: str) -> None:
        """Set the title. Raises StoreError."""
        self._title = title
        if self._store and self.conversation is not None:
            self._store.rename(self.conversation, title)

    def forget(self) -> None:
        """Record another, new conversation from here on."""
        self.conversation, self._title = None, ""
        self._message_ids, self._changes, self._saved_about = {}, {}, {}

    # the tree

    def save(self, leaf: Output | None, about: ConversationContent) -> None:
        """Store what is missing of the branch to `leaf`, and `about` where it changed."""
        self._write(lambda store: self._save(store, leaf, about))

    def begin(self, output: Output) -> None:
        """Stream `output` from here on, by `update` and `finish`."""
        self._write(lambda store: self._begin(store, output))

    def update(self, text: str, thought: str, ids: Sequence[int]) -> None:
        """Write the reply so far; never waits. After an error `finish` tries again."""
        if (writer := self._writer) and not self._stream_broken:
            self._write(lambda _: self._update(writer, text, thought, ids))

    def finish(self, output: Output, done: Done | None) -> None:
        """Write the reply as it is now; without `done` it was abandoned."""
        self._write(lambda _: self._finish(output, done))

    def _write(self, action: Callable[[Store], None]) -> None:
        if self._store is None:
            return
        try:
            action(self._store)
        except StoreError as error:
            if str(error) != self._trouble:
                self._notices.append(f"this conversation is not being saved: {error}")
            self._trouble = str(error)

    def _save(self, store: Store, leaf: Output | None, about: ConversationContent) -> None:
        missing = [node for node in branch(leaf) if node.number not in self._message_ids]
        if self.conversation is None:
            if missing:
                content = about | ConversationContent(model=self._engine.identity)
                drafts, pictures = _drafts(missing), _pictures(missing)
                self.conversation, ids = store.create_with_nodes(content, drafts, pictures)
                self._saved_model = self._engine.identity
                self._remember(missing, ids)
            return
        self._save_about(store, self.conversation, about)
        if not missing:
            store.set_leaf(self.conversation, None if leaf is None else self._message_ids[leaf.number])
            return
        if self._changes or self._saved_model != self._engine.identity:
            store.change_model(self.conversation, self._engine.identity, self._changes)
            self._changes, self._saved_model = {}, self._engine.identity
        parent = missing[0].parent
        message_id = None if parent is None else self._message_ids[parent.number]
        ids = store.add_nodes(self.conversation, message_id, _drafts(missing), _pictures(missing))
        self._remember(missing, ids)

    def _save_about(self, store: Store, conversation: int, about: ConversationContent) -> None:
        """Update everything but the title, which other processes may have changed."""
        changed = {name: value for name, value in about.items() if name != "title"}
        if changed != self._saved_about:
            store.update(conversation, **changed)  # pyright: ignore[reportArgumentType]
            self._saved_about = changed

    def _begin(self, store: Store, output: Output) -> None:
        message_id = self._message_ids.get(output.number)
        self._writer = (
            StreamWriter(store, message_id, SAVE_PERIOD_SECONDS) if message_id is not None else None
        )

        self._stream_broken = False

    def _update(self, writer: StreamWriter, text: str, thought: str, ids: Sequence[int]) -> None:
        self._stream_broken = True
        writer.update(text, thought, ids)
        self._stream_broken = False

    def _finish(self, output: Output, done: Done | None) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        message_id = self._message_ids[output.number]
        reason = done.finish_reason if done else "cancelled"
        content = _content(output, "complete" if reason in COMPLETE else "cancelled")
        self._changes[message_id] = content  # until it is written
        writer.finish(**content)
        del self._changes[message_id]

    def _remember(self, nodes: Sequence[Node], ids: Sequence[int]) -> None:
        """Note the message ids of `nodes`; a node with several messages is known by its last one."""
        position = -1
        for node in nodes:
            position += len(node.messages) if isinstance(node, Input) else 1
            self._message_ids[node.number] = ids[position]

    def owner(self) -> str:
        """Return the name under which states are saved for this conversation.

        Empty where nothing is stored, or the conversation was deleted: nothing would delete its states.
        """
        with suppress(StoreError):
            if self._store and self.conversation is not None and self._store.has(self.conversation):
                return str(self.conversation)
        return ""


def _drafts(nodes: Sequence[Node]) -> list[NodeDraft]:
    """Return the messages of `nodes` for the store, each under the one before."""
    drafts: list[NodeDraft] = []
    for node in nodes:
        for content, role in _messages(node):
            parent = len(drafts) - 1 if drafts else None
            drafts.append(NodeDraft(parent, role, node.created, content))
    return drafts


def _pictures(nodes: Sequence[Node]) -> dict[str, bytes]:
    """Return the files of the pictures that `nodes` show, by digest."""
    shown = [placed.picture for node in nodes if isinstance(node, Input) for placed in node.pictures]
    return {picture.digest: picture.data for picture in shown}


def _messages(node: Node) -> list[tuple[NodeContent, Any]]:
    if isinstance(node, Output):
        complete = node.stats.get("finish_reason") in COMPLETE
        state: NodeState = "complete" if complete else "cancelled" if node.ids else "streaming"
        return [(_content(node, state), "assistant")]
    written = [
        (NodeContent(text=str(m["content"]), images=m.get("images", ())), m["role"]) for m in node.messages
    ]
    # the template writes tools and effort before the first message, so only that one stores its switches
    settings = {} if node.parent else {"switches": node.switches}
    written[-1][0].update(ids=node.ids, settings=settings)
    return written


def _content(output: Output, state: NodeState) -> NodeContent:
    message = output.message
    return NodeContent(
        text=str(message["content"]),
        thinking=message.get("reasoning_content") or "",
        tool_calls=tool_calls_of(message),
        ids=output.ids,
        opener=output.opener,
        state=state,
        settings=output.settings,
        stats=output.stats,
        model_name=output.model_name,
    )
