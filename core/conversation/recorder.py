"""Keeps a session's tree in a store as it grows: what is missing of a branch, and a reply while it streams.

Knows which message of the store each node is. Raises StoreError where the store does; nothing of that is lost
to the session, whose next turn writes what is still missing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..events import Done
from ..storage.records import ConversationContent, ModelIdentity, NodeContent, NodeDraft, State
from ..storage.store import PERIOD_SECONDS, Store, StreamWriter
from .transcript import Input, Node, Output, branch, calls_of

WHOLE = ("stop", "length")


class Recorder:
    """The stored side of one session; `conversation` is None until there is something to store."""

    def __init__(
        self,
        store: Store,
        identity: ModelIdentity,
        conversation: int | None = None,
        places: Mapping[int, int] | None = None,
        changes: Mapping[int, NodeContent] | None = None,
    ):
        """`places` are message ids by node number; `changes` to messages wait until it goes on."""
        self.store, self.identity, self.conversation = store, identity, conversation
        self._places = dict(places or {})
        self._changes = dict(changes or {})
        self._about: dict[str, Any] = {}
        self._writer: StreamWriter | None = None
        self._broken = False

    def save(self, leaf: Output | None, about: ConversationContent) -> None:
        """Store what is missing of the branch to `leaf`, that it is the current one, and `about` where it has
        changed; the title only of a new conversation, for others may rename it."""
        missing = [node for node in branch(leaf) if node.number not in self._places]
        if self.conversation is None:
            if missing:
                content = about | ConversationContent(model=self.identity)
                self.conversation, ids = self.store.begin(content, _drafts(missing))
                self._found(missing, ids)
            return
        changed = {name: value for name, value in about.items() if name != "title"}
        if changed != self._about:
            self.store.update(self.conversation, **changed)  # pyright: ignore[reportArgumentType]
            self._about = changed
        if not missing:
            self.store.set_leaf(self.conversation, None if leaf is None else self._places[leaf.number])
            return
        if self._changes:
            self.store.adopt(self.conversation, self.identity, self._changes)
            self._changes = {}
        parent = missing[0].parent
        place = None if parent is None else self._places[parent.number]
        self._found(missing, self.store.add_nodes(self.conversation, place, _drafts(missing)))

    def begin(self, output: Output) -> None:
        """From here on `update` and `finish` write `output`, if it could be saved."""
        place = self._places.get(output.number)
        self._writer = StreamWriter(self.store, place, PERIOD_SECONDS) if place is not None else None
        self._broken = False

    def update(self, text: str, thought: str, ids: Sequence[int]) -> None:
        """What there is of the reply so far; never waits. After an error it is `finish` that tries again."""
        if self._writer is None or self._broken:
            return
        self._broken = True
        self._writer.update(text, thought, ids)
        self._broken = False

    def finish(self, output: Output, done: Done | None) -> None:
        """Write the reply as it is now; without `done` it was left half way."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        reason = done.finish_reason if done else "cancelled"
        content = _content(output, "complete" if reason in WHOLE else "cancelled")
        self._changes[self._places[output.number]] = content  # until it is written
        writer.finish(**content)
        del self._changes[self._places[output.number]]

    def forget(self) -> None:
        """What comes next is another conversation."""
        self.conversation = None
        self._places, self._changes, self._about = {}, {}, {}

    def _found(self, nodes: Sequence[Node], ids: Sequence[int]) -> None:
        """Of a node with several messages the last one is its place."""
        position = -1
        for node in nodes:
            position += len(node.messages) if isinstance(node, Input) else 1
            self._places[node.number] = ids[position]


def _drafts(nodes: Sequence[Node]) -> list[NodeDraft]:
    """One after another, each under the one before."""
    drafts: list[NodeDraft] = []
    for node in nodes:
        for content, role in _messages(node):
            parent = len(drafts) - 1 if drafts else None
            drafts.append(NodeDraft(parent, role, node.created, content))
    return drafts


def _messages(node: Node) -> list[tuple[NodeContent, Any]]:
    if isinstance(node, Output):
        whole = node.stats.get("finish_reason") in WHOLE
        state: State = "complete" if whole else "cancelled" if node.ids else "streaming"
        return [(_content(node, state), "assistant")]
    written = [(NodeContent(text=str(m["content"])), m["role"]) for m in node.messages]
    # tools and efforts stand before the first message, so only that one must know its switches
    settings = {} if node.parent else {"switches": node.switches}
    written[-1][0].update(ids=node.ids, settings=settings)
    return written


def _content(output: Output, state: State) -> NodeContent:
    message = output.message
    return NodeContent(
        text=str(message["content"]),
        thinking=message.get("reasoning_content") or "",
        tool_calls=calls_of(message),
        ids=output.ids,
        opener=output.opener,
        state=state,
        settings=output.settings,
        stats=output.stats,
    )
