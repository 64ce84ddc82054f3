"""Conversations on disk: each a tree of messages with the exact ids, in one SQLite file for all processes.

Owns the pace at which a streaming reply is written. Refuses what `database.py` refuses, and
messages or conversations that are not there. Does not judge ids: an imported file may claim any.
"""

import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from sqlite3 import Row
from typing import Any, TypeVar, Unpack

from ..errors import StoreError
from .database import Database, Execute
from .fulltext import FullText
from .records import (
    APPLICATION_ID,
    MIGRATIONS,
    Conversation,
    ConversationContent,
    Hit,
    ModelIdentity,
    Node,
    NodeContent,
    NodeDraft,
    Role,
    conversation_of,
    encoded,
    node_of,
    title_of,
)

T = TypeVar("T")

UNDO_SECONDS = 60.0
# half a second of the two that may be lost is left for the write itself
PERIOD_SECONDS = 1.5
BRANCH = """
    WITH RECURSIVE path (id, parent) AS (
        SELECT id, parent FROM nodes WHERE conversation = ?1 AND id = ?2
        UNION SELECT nodes.id, nodes.parent FROM path JOIN nodes ON nodes.id = path.parent
    )
    SELECT * FROM nodes WHERE id IN (SELECT id FROM path) ORDER BY id"""


class Store:
    """All conversations in one file. Every method raises StoreError; any thread may call."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time):
        """Make or open the file `path`; `clock` gives seconds since 1970."""
        self._clock = clock
        self._database = Database(Path(path).expanduser(), APPLICATION_ID, MIGRATIONS)
        self.path = self._database.path
        try:
            self._index = FullText(self._database)
            self.purge(UNDO_SECONDS)
        except BaseException:
            self._database.close()
            raise

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        return cls(path)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def states_folder(self) -> Path:
        """Where `NUMBER.safetensors` may hold a conversation's live state; it goes with the conversation."""
        return self.path.with_suffix(".states")

    # --- conversations ---

    def create(self, **content: Unpack[ConversationContent]) -> int:
        """A new conversation without messages; its id. Without a title it gets one from the first message."""
        with self._database.write() as execute:
            return _create(execute, content, self._clock(), imported=False)

    def import_tree(
        self, content: ConversationContent, drafts: Sequence[NodeDraft], leaf: int | None, created: float
    ) -> int:
        """A whole conversation at once; `parent` and `leaf` are positions in `drafts`, parents first."""
        with self._database.write() as execute:
            conversation = _create(execute, content, created, imported=True)
            ids = _add_all(execute, conversation, None, drafts)
            _set_leaf(execute, conversation, None if leaf is None else ids[leaf])
            execute("UPDATE conversations SET updated = ? WHERE id = ?", self._clock(), conversation)
        return conversation

    def begin(self, content: ConversationContent, drafts: Sequence[NodeDraft]) -> tuple[int, list[int]]:
        """A new conversation with its first messages, the last of which is the leaf: its id and theirs."""
        with self._database.write() as execute:
            conversation = _create(execute, content, self._clock(), imported=False)
            ids = _add_all(execute, conversation, None, drafts)
            _set_leaf(execute, conversation, ids[-1])
        return conversation, ids

    def adopt(self, conversation: int, model: ModelIdentity, contents: Mapping[int, NodeContent]) -> None:
        """Make the conversation one of `model`'s, whose ids its messages get."""
        with self._database.write() as execute:
            columns = encoded({"model": model}) | {"imported": False}
            _change(execute, "conversations", conversation, columns)
            for node, content in contents.items():
                _change(execute, "nodes", node, encoded(content))

    def conversation(self, conversation: int) -> Conversation:
        rows = self._database.read(
            "SELECT * FROM conversations WHERE id = ? AND deleted IS NULL", conversation
        )
        if not rows:
            raise StoreError(f"there is no conversation {conversation}")
        return self._conversation(rows[0])

    def conversations(self, limit: int = 50, search: str = "") -> list[Conversation]:
        """The last ones that were written to, newest first; with `search` only those that hold its words."""
        chosen, values = "", ()
        if search.strip():
            query, values = self._index.query(search)
            chosen = f"AND id IN (SELECT conversation FROM ({query}))"
        rows = self._database.read(
            f"""SELECT * FROM conversations WHERE deleted IS NULL {chosen}
                ORDER BY updated DESC, id DESC LIMIT ?""",
            *values,
            limit,
        )
        return [self._conversation(row) for row in rows]

    def latest(self) -> Conversation | None:
        """The one that was written to last."""
        return next(iter(self.conversations(1)), None)

    def search(self, words: str, limit: int = 50) -> list[Hit]:
        """Titles and messages that hold all `words`, the last of them perhaps only begun; newest first."""
        query, values = self._index.query(words)
        rows = self._database.read(
            f"""SELECT hits.conversation, title, node, role, snippet FROM ({query}) AS hits
                JOIN conversations ON conversations.id = hits.conversation
                LEFT JOIN nodes ON nodes.id = hits.node
                WHERE deleted IS NULL ORDER BY updated DESC, conversations.id DESC, node LIMIT ?""",
            *values,
            limit,
        )
        return [
            Hit(row["conversation"], row["title"], row["node"], row["role"], " ".join(row["snippet"].split()))
            for row in rows
        ]

    def update(self, conversation: int, **content: Unpack[ConversationContent]) -> None:
        """Replace the given fields; its place in the list stays."""
        with self._database.write() as execute:
            _change(execute, "conversations", conversation, encoded(content))

    def rename(self, conversation: int, title: str) -> None:
        self.update(conversation, title=title)

    def delete(self, conversation: int) -> None:
        """Hide it; `restore` brings it back until it is purged, `UNDO_SECONDS` later at the earliest."""
        self.conversation(conversation)
        with self._database.write() as execute:
            _change(execute, "conversations", conversation, {"deleted": self._clock()})

    def restore(self, conversation: int) -> None:
        with self._database.write() as execute:
            _change(execute, "conversations", conversation, {"deleted": None})

    def purge(self, seconds: float = 0.0) -> int:
        """Erase what was deleted at least so many seconds ago, from the index, the log and the saved states
        too; how many. A state that cannot be erased is named when all others are."""
        condition, limit = "deleted <= ?", self._clock() - seconds
        if not self._database.read(f"SELECT 1 FROM conversations WHERE {condition} LIMIT 1", limit):
            return 0
        with self._database.write() as execute:
            erased = execute(f"SELECT id FROM conversations WHERE {condition}", limit).fetchall()
            execute(f"DELETE FROM conversations WHERE {condition}", limit)
            self._index.forget(execute)
        self._database.shrink_log()
        problems = [problem for row in erased if (problem := self._erase_state(row["id"]))]
        if problems:
            raise StoreError(f"cannot erase the saved state {problems[0].filename}: {problems[0].strerror}")
        return len(erased)

    def _erase_state(self, conversation: int) -> OSError | None:
        """Why it is still there."""
        try:
            (self.states_folder / f"{conversation}.safetensors").unlink(missing_ok=True)
        except OSError as problem:
            return problem
        return None

    # --- messages ---

    def add_node(
        self, conversation: int, parent: int | None, role: Role, **content: Unpack[NodeContent]
    ) -> int:
        """A new message under `parent`, a first one under None; it becomes the leaf. Returns its id."""
        now = self._clock()
        with self._database.write() as execute:
            self.conversation(conversation)
            if parent is not None:
                self._require(conversation, parent)
            node = _add(execute, conversation, parent, NodeDraft(parent, role, now, content))
            _set_leaf(execute, conversation, node)
            execute("UPDATE conversations SET updated = ? WHERE id = ?", now, conversation)
            if role == "user":
                _name_after(execute, conversation, content.get("text", ""))
        return node

    def add_nodes(self, conversation: int, parent: int | None, drafts: Sequence[NodeDraft]) -> list[int]:
        """New messages, all or none; a draft without a parent comes under `parent`; the last is the leaf.

        Returns their ids.
        """
        with self._database.write() as execute:
            self.conversation(conversation)
            if parent is not None:
                self._require(conversation, parent)
            ids = _add_all(execute, conversation, parent, drafts)
            _set_leaf(execute, conversation, ids[-1])
            execute("UPDATE conversations SET updated = ? WHERE id = ?", self._clock(), conversation)
        return ids

    def update_node(self, node: int, **content: Unpack[NodeContent]) -> None:
        """Replace the given fields."""
        with self._database.write() as execute:
            _change(execute, "nodes", node, encoded(content))
            execute(
                "UPDATE conversations SET updated = ?"
                " WHERE id = (SELECT conversation FROM nodes WHERE id = ?)",
                self._clock(),
                node,
            )

    def branch(self, conversation: int, leaf: int | None = None) -> list[Node]:
        """The messages from the first one to `leaf`, or to where the user is."""
        leaf = self.conversation(conversation).leaf if leaf is None else leaf
        if leaf is None:
            return []
        self._require(conversation, leaf)
        return [self._node(row) for row in self._database.read(BRANCH, conversation, leaf)]

    def nodes(self, conversation: int) -> list[Node]:
        """The whole tree, parents before children."""
        rows = self._database.read("SELECT * FROM nodes WHERE conversation = ? ORDER BY id", conversation)
        return [self._node(row) for row in rows]

    def set_leaf(self, conversation: int, node: int | None) -> None:
        """Go to another message; None is before the first."""
        with self._database.write() as execute:
            self.conversation(conversation)
            if node is not None:
                self._require(conversation, node)
            _set_leaf(execute, conversation, node)

    # --- rows ---

    def _require(self, conversation: int, node: int) -> None:
        if not self._database.read(
            "SELECT 1 FROM nodes WHERE conversation = ? AND id = ?", conversation, node
        ):
            raise StoreError(f"there is no message {node} in conversation {conversation}")

    def _conversation(self, row: Row) -> Conversation:
        return self._value(conversation_of, row)

    def _node(self, row: Row) -> Node:
        return self._value(node_of, row)

    def _value(self, build: Callable[[Row], T], row: Row) -> T:
        try:
            return build(row)
        except (ValueError, TypeError, AttributeError, zlib.error) as problem:
            kind = "conversation" if build is conversation_of else "message"
            raise StoreError(
                f"{self._database.path} is damaged: {kind} {row['id']} cannot be read"
            ) from problem


class StreamWriter:
    """Keeps a node up to date while its reply streams, from a thread of its own: `update` never waits."""

    def __init__(self, store: Store, node: int, every_seconds: float = PERIOD_SECONDS):
        self._store, self._node, self._every_seconds = store, node, every_seconds
        self._latest: tuple[str, str, Sequence[int], int] = ("", "", (), 0)
        self._problem: StoreError | None = None
        self._arrived, self._finished = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writer of message {node}", daemon=True)
        self._thread.start()

    def update(self, text: str, thinking: str, ids: Sequence[int]) -> None:
        """All there is so far; `ids` may grow afterwards. Raises StoreError when the last write failed."""
        if self._problem:
            raise self._problem
        self._latest = (text, thinking, ids, len(ids))
        self._arrived.set()

    def finish(self, **content: Unpack[NodeContent]) -> None:
        """Write the reply's last form, complete unless `content` gives another state. Raises StoreError."""
        self._finished.set()
        self._arrived.set()
        self._thread.join()
        self._store.update_node(self._node, **NodeContent(state="complete") | content)

    def _run(self) -> None:
        while self._arrived.wait() and not self._finished.is_set():
            self._arrived.clear()
            text, thinking, ids, count = self._latest
            try:
                self._store.update_node(self._node, text=text, thinking=thinking, ids=ids[:count])
            except StoreError as problem:
                self._problem = problem
                return
            self._finished.wait(self._every_seconds)


def _create(execute: Execute, content: ConversationContent, created: float, *, imported: bool) -> int:
    columns = {
        **encoded({"title": "", "system": "", "settings": {}, "model": ModelIdentity()} | content),
        "imported": imported,
        "created": created,
        "updated": created,
    }
    return _insert(execute, "conversations", columns)


def _add(execute: Execute, conversation: int, parent: int | None, draft: NodeDraft) -> int:
    place = {
        "conversation": conversation,
        "parent": parent,
        "role": draft.role,
        "created": draft.created,
    }
    return _insert(execute, "nodes", place | encoded(draft.content))


def _add_all(execute: Execute, conversation: int, root: int | None, drafts: Sequence[NodeDraft]) -> list[int]:
    """Ids of the new messages; a parent is a position among them, None is `root`."""
    ids: list[int] = []
    for draft in drafts:
        parent = root if draft.parent is None else ids[draft.parent]
        ids.append(_add(execute, conversation, parent, draft))
    return ids


def _insert(execute: Execute, table: str, columns: Mapping[str, Any]) -> int:
    places = ", ".join("?" * len(columns))
    added = execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", *columns.values())
    if added.lastrowid is None:
        raise StoreError(f"nothing was added to {table}")
    return added.lastrowid


def _change(execute: Execute, table: str, id: int, columns: Mapping[str, Any]) -> None:
    if not columns:
        return
    if columns.keys() & {"title", "text"}:
        columns = {**columns, "indexed": 0}
    places = ", ".join(f"{name} = ?" for name in columns)
    if not execute(f"UPDATE {table} SET {places} WHERE id = ?", *columns.values(), id).rowcount:
        raise StoreError(f"there is no {'message' if table == 'nodes' else 'conversation'} {id} any more")


def _set_leaf(execute: Execute, conversation: int, node: int | None) -> None:
    execute("UPDATE conversations SET leaf = ? WHERE id = ?", node, conversation)


def _name_after(execute: Execute, conversation: int, text: str) -> None:
    """Give a conversation without a title the beginning of `text`."""
    if execute("SELECT 1 FROM conversations WHERE id = ? AND title = ''", conversation).fetchone():
        _change(execute, "conversations", conversation, encoded({"title": title_of(text)}))
