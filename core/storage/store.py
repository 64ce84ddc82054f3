"""Conversations on disk: trees of messages with their exact token ids, in one SQLite file for all processes.

Owns the schedule on which a streaming reply is saved. Refuses the files that `database.py` refuses. Does not
verify token ids: an imported file may hold any.
"""

import hashlib
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
    MAX_RESULT_NBYTES,
    MAX_RESULTS_NBYTES,
    MIGRATIONS,
    Conversation,
    ConversationContent,
    Hit,
    KeptResult,
    ModelIdentity,
    Node,
    NodeContent,
    NodeDraft,
    Role,
    damaged_conversation,
    encode_columns,
    make_title,
    parse_conversation,
    parse_node,
    parse_result,
    result_nbytes,
)
from .state_files import SERVED, release

T = TypeVar("T")
Pictures = Mapping[str, bytes]
NO_PICTURES: Pictures = {}

UNDO_SECONDS = 60.0
# at most 2 s of a reply may be lost in a crash: this leaves 0.5 s for the write itself
SAVE_PERIOD_SECONDS = 1.5
BRANCH = """
    WITH RECURSIVE path (id, parent) AS (
        SELECT id, parent FROM nodes WHERE conversation = ?1 AND id = ?2
        UNION SELECT nodes.id, nodes.parent FROM path JOIN nodes ON nodes.id = path.parent
    )
    SELECT * FROM nodes WHERE id IN (SELECT id FROM path) ORDER BY id"""

FORGET_RESULTS = """
    DELETE FROM results WHERE id IN (
        SELECT id FROM (
            SELECT id, sum(length(CAST(title || text || parts AS BLOB))) OVER (ORDER BY id DESC) AS nbytes
            FROM results WHERE conversation = ?1
        ) WHERE nbytes > ?2
    )"""


class Store:
    """All conversations in one file. Every method may raise StoreError and may be called from any thread."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time):
        """Create or open the file `path`; `clock` returns seconds since 1970."""
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
        """The folder of saved states, which are deleted with the last conversation that they serve."""
        return self.path.with_suffix(".states")

    # --- conversations ---

    def create(self, **content: Unpack[ConversationContent]) -> int:
        """Create an empty conversation and return its id. Its first question becomes the default title."""
        with self._database.write() as execute:
            return _insert_conversation(execute, content, self._clock(), imported=False)

    def import_tree(
        self,
        content: ConversationContent,
        drafts: Sequence[NodeDraft],
        leaf: int | None,
        created: float,
        pictures: Pictures = NO_PICTURES,
    ) -> int:
        """Add a whole conversation and return its id. `leaf` is a position in `drafts`, parents first."""
        with self._database.write() as execute:
            conversation = _insert_conversation(execute, content, created, imported=True)
            ids = _insert_nodes(execute, conversation, None, drafts)
            _insert_pictures(execute, conversation, pictures)
            _set_leaf(execute, conversation, None if leaf is None else ids[leaf])
            execute("UPDATE conversations SET updated = ? WHERE id = ?", self._clock(), conversation)
        return conversation

    def create_with_nodes(
        self, content: ConversationContent, drafts: Sequence[NodeDraft], pictures: Pictures = NO_PICTURES
    ) -> tuple[int, list[int]]:
        """Create a conversation with its first messages; the last is the leaf. Returns its id and theirs.

        `pictures` are the files that they show, by digest.
        """
        with self._database.write() as execute:
            conversation = _insert_conversation(execute, content, self._clock(), imported=False)
            ids = _insert_nodes(execute, conversation, None, drafts)
            _insert_pictures(execute, conversation, pictures)
            _set_leaf(execute, conversation, ids[-1])
        return conversation, ids

    def change_model(
        self, conversation: int, model: ModelIdentity, contents: Mapping[int, NodeContent]
    ) -> None:
        """Assign the conversation to `model` and update its messages, by id, with that model's token ids."""
        with self._database.write() as execute:
            columns = encode_columns({"model": model}) | {"imported": False}
            _update_row(execute, "conversations", conversation, columns)
            for node, content in contents.items():
                _update_row(execute, "nodes", node, encode_columns(content))

    def conversation(self, conversation: int) -> Conversation:
        """Return the conversation with this id, unless it was deleted."""
        rows = self._database.read(
            "SELECT * FROM conversations WHERE id = ? AND deleted IS NULL", conversation
        )
        if not rows:
            raise StoreError(f"there is no conversation {conversation}")
        return self._conversation(rows[0])

    def conversations(self, limit: int = 50, search: str = "") -> list[Conversation]:
        """Return the most recently updated conversations, newest first; filter by the words of `search`.

        One that cannot be read is in the list as `damaged`.
        """
        condition, values = "", ()
        if search.strip():
            query, values = self._index.query(search)
            condition = f"AND id IN (SELECT conversation FROM ({query}))"
        rows = self._database.read(
            f"""SELECT * FROM conversations WHERE deleted IS NULL {condition}
                ORDER BY updated DESC, id DESC LIMIT ?""",
            *values,
            limit,
        )
        return [self._conversation_or_mark(row) for row in rows]

    def model_names(self) -> dict[int, list[str]]:
        """Return the names of the models that replied in each conversation, by its id."""
        rows = self._database.read(
            "SELECT DISTINCT conversation, model_name FROM nodes WHERE model_name != ''"
        )
        names: dict[int, list[str]] = {}
        for row in rows:
            if isinstance(row["model_name"], str):  # others are damaged
                names.setdefault(row["conversation"], []).append(row["model_name"])
        return names

    def question_counts(self) -> dict[int, int]:
        """Return how many questions each conversation holds, on all branches, by its id."""
        counted = "SELECT conversation, COUNT(*) FROM nodes WHERE role = 'user' GROUP BY conversation"
        return {row[0]: row[1] for row in self._database.read(counted)}

    def latest(self) -> Conversation | None:
        """Return the most recently updated conversation that can be read."""
        return next((found for found in self.conversations() if not found.damaged), None)

    def has(self, conversation: int) -> bool:
        """Whether there is such a conversation, be it damaged."""
        rows = "SELECT 1 FROM conversations WHERE id = ? AND deleted IS NULL"
        return bool(self._database.read(rows, conversation))

    def search(self, words: str, limit: int = 50) -> list[Hit]:
        """Return titles and messages that contain all `words`, the last one as a prefix; newest first."""
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
            if isinstance(row["title"], str) and isinstance(row["snippet"], str)  # others are damaged
        ]

    def update(self, conversation: int, **content: Unpack[ConversationContent]) -> None:
        """Replace the given fields, without moving the conversation in the list."""
        with self._database.write() as execute:
            _update_row(execute, "conversations", conversation, encode_columns(content))

    def rename(self, conversation: int, title: str) -> None:
        self.update(conversation, title=title)

    def delete(self, conversation: int) -> None:
        """Hide the conversation. `restore` undoes this until a purge, at least `UNDO_SECONDS` later."""
        if not self.has(conversation):
            raise StoreError(f"there is no conversation {conversation}")
        with self._database.write() as execute:
            _update_row(execute, "conversations", conversation, {"deleted": self._clock()})

    def restore(self, conversation: int) -> None:
        """Undo `delete`."""
        with self._database.write() as execute:
            _update_row(execute, "conversations", conversation, {"deleted": None})

    def purge(self, seconds: float = 0.0) -> int:
        """Erase the conversations deleted at least `seconds` ago and return their number.

        Also erases them from the index, the log and the saved states. Raises StoreError if a state cannot be
        erased, after erasing the others.
        """
        condition, limit = "deleted <= ?", self._clock() - seconds
        if not self._database.read(f"SELECT 1 FROM conversations WHERE {condition} LIMIT 1", limit):
            return 0
        with self._database.write() as execute:
            erased = execute(f"SELECT id FROM conversations WHERE {condition}", limit).fetchall()
            execute(f"DELETE FROM conversations WHERE {condition}", limit)
            self._index.remove_deleted(execute)
        self._database.shrink_log()
        self._erase_states([str(row["id"]) for row in erased])
        return len(erased)

    def erase_served(self) -> None:
        """Erase the saved states of requests to a server. Raises StoreError."""
        self._erase_states([SERVED])

    def _erase_states(self, owners: Sequence[str]) -> None:
        """Erase the states that serve nobody but `owners`. Raises StoreError after erasing the others."""
        problem: OSError | None = None
        for owner in owners:
            try:
                release(self.states_folder, owner)
            except OSError as error:
                problem = problem or error
        if problem:
            raise StoreError(f"cannot erase the saved state {problem.filename}: {problem.strerror}")

    # --- messages ---

    def add_node(
        self, conversation: int, parent: int | None, role: Role, **content: Unpack[NodeContent]
    ) -> int:
        """Add a message under `parent`, or a first message; it becomes the leaf. Returns its id."""
        now = self._clock()
        with self._database.write() as execute:
            self.conversation(conversation)
            if parent is not None:
                self._require_node(conversation, parent)
            node = _insert_node(execute, conversation, parent, NodeDraft(parent, role, now, content))
            _set_leaf(execute, conversation, node)
            execute("UPDATE conversations SET updated = ? WHERE id = ?", now, conversation)
            if role == "user":
                _set_default_title(execute, conversation, content.get("text", ""))
        return node

    def add_nodes(
        self,
        conversation: int,
        parent: int | None,
        drafts: Sequence[NodeDraft],
        pictures: Pictures = NO_PICTURES,
    ) -> list[int]:
        """Add all messages or none and return their ids; the last one becomes the leaf.

        A draft without a parent is added under `parent`. `pictures` are as in `create_with_nodes`.
        """
        with self._database.write() as execute:
            self.conversation(conversation)
            if parent is not None:
                self._require_node(conversation, parent)
            ids = _insert_nodes(execute, conversation, parent, drafts)
            _insert_pictures(execute, conversation, pictures)
            _set_leaf(execute, conversation, ids[-1])
            execute("UPDATE conversations SET updated = ? WHERE id = ?", self._clock(), conversation)
        return ids

    def update_node(self, node: int, **content: Unpack[NodeContent]) -> None:
        """Replace the given fields of a message."""
        with self._database.write() as execute:
            _update_row(execute, "nodes", node, encode_columns(content))
            execute(
                "UPDATE conversations SET updated = ?"
                " WHERE id = (SELECT conversation FROM nodes WHERE id = ?)",
                self._clock(),
                node,
            )

    def branch(self, conversation: int, leaf: int | None = None) -> list[Node]:
        """Return the messages from the first one to `leaf`, by default the conversation's leaf."""
        leaf = self.conversation(conversation).leaf if leaf is None else leaf
        if leaf is None:
            return []
        self._require_node(conversation, leaf)
        return [self._node(row) for row in self._database.read(BRANCH, conversation, leaf)]

    def nodes(self, conversation: int) -> list[Node]:
        """Return the whole tree, parents before children."""
        rows = self._database.read("SELECT * FROM nodes WHERE conversation = ? ORDER BY id", conversation)
        return [self._node(row) for row in rows]

    def set_leaf(self, conversation: int, node: int | None) -> None:
        """Make `node` the leaf; None means before the first message."""
        with self._database.write() as execute:
            self.conversation(conversation)
            if node is not None:
                self._require_node(conversation, node)
            _set_leaf(execute, conversation, node)

    # --- pictures ---

    def pictures(self, conversation: int, digest: str | None = None) -> dict[str, bytes]:
        """Return the files that a conversation shows, or the one of `digest`, by digest; none is damaged."""
        sql = "SELECT digest, data FROM pictures WHERE conversation = ? AND digest = ifnull(?, digest)"
        rows = self._database.read(sql, conversation, digest)
        return {
            row["digest"]: row["data"]
            for row in rows
            if isinstance(row["data"], bytes) and hashlib.sha256(row["data"]).hexdigest() == row["digest"]
        }

    # --- results ---

    def add_result(self, conversation: int, turn: int, title: str, text: str, parts: Sequence[Any]) -> None:
        """Keep a result with the conversation, in place of the oldest ones beyond MAX_RESULTS_NBYTES.

        Raises StoreError for one beyond MAX_RESULT_NBYTES.
        """
        columns = encode_columns({"title": make_title(title), "text": text, "parts": list(parts)})
        if result_nbytes(title, text, parts) > MAX_RESULT_NBYTES:
            raise StoreError(f"{title} is too large to be kept, more than {MAX_RESULT_NBYTES >> 10} KiB")
        with self._database.write() as execute:
            self.conversation(conversation)
            places = {"conversation": conversation, "turn": turn, "created": self._clock()}
            _insert_row(execute, "results", places | columns)
            execute(FORGET_RESULTS, conversation, MAX_RESULTS_NBYTES)

    def results(self, conversation: int) -> list[KeptResult]:
        """Return the results kept with a conversation, oldest first; damaged ones are left out."""
        rows = self._database.read("SELECT * FROM results WHERE conversation = ? ORDER BY id", conversation)
        return [result for row in rows if (result := parse_result(row)) is not None]

    # --- rows ---

    def _require_node(self, conversation: int, node: int) -> None:
        if not self._database.read(
            "SELECT 1 FROM nodes WHERE conversation = ? AND id = ?", conversation, node
        ):
            raise StoreError(f"conversation {conversation} has no message {node}")

    def _conversation(self, row: Row) -> Conversation:
        return self._parse(parse_conversation, row)

    def _conversation_or_mark(self, row: Row) -> Conversation:
        try:
            return self._conversation(row)
        except StoreError:
            return damaged_conversation(row["id"])

    def _node(self, row: Row) -> Node:
        return self._parse(parse_node, row)

    def _parse(self, build: Callable[[Row], T], row: Row) -> T:
        try:
            return build(row)
        except (ValueError, zlib.error) as problem:
            kind = "conversation" if build is parse_conversation else "message"
            raise StoreError(
                f"{self._database.path} is damaged: {kind} {row['id']} cannot be read ({problem})"
            ) from problem


class StreamWriter:
    """Saves a node from its own thread while the reply streams, so that `update` never blocks."""

    def __init__(self, store: Store, node: int, period_seconds: float = SAVE_PERIOD_SECONDS):
        self._store, self._node, self._period_seconds = store, node, period_seconds
        self._latest: tuple[str, str, Sequence[int], int] = ("", "", (), 0)
        self._problem: StoreError | None = None
        self._updated, self._finished = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writer of message {node}", daemon=True)
        self._thread.start()

    def update(self, text: str, thinking: str, ids: Sequence[int]) -> None:
        """Set the reply so far; `ids` may grow afterwards. Raises StoreError if an earlier write failed."""
        if self._problem:
            raise self._problem
        self._latest = (text, thinking, ids, len(ids))
        self._updated.set()

    def finish(self, **content: Unpack[NodeContent]) -> None:
        """Write the final reply; its state is complete unless `content` says otherwise. Raises StoreError."""
        self._finished.set()
        self._updated.set()
        self._thread.join()
        self._store.update_node(self._node, **NodeContent(state="complete") | content)

    def _run(self) -> None:
        while self._updated.wait() and not self._finished.is_set():
            self._updated.clear()
            text, thinking, ids, count = self._latest
            try:
                self._store.update_node(self._node, text=text, thinking=thinking, ids=ids[:count])
            except StoreError as problem:
                self._problem = problem
                return
            self._finished.wait(self._period_seconds)


def _insert_conversation(
    execute: Execute, content: ConversationContent, created: float, *, imported: bool
) -> int:
    columns = {
        **encode_columns({"title": "", "system": "", "settings": {}, "model": ModelIdentity()} | content),
        "imported": imported,
        "created": created,
        "updated": created,
    }
    return _insert_row(execute, "conversations", columns)


def _insert_node(execute: Execute, conversation: int, parent: int | None, draft: NodeDraft) -> int:
    columns = {"conversation": conversation, "parent": parent, "role": draft.role, "created": draft.created}
    return _insert_row(execute, "nodes", columns | encode_columns(draft.content))


def _insert_nodes(
    execute: Execute, conversation: int, root: int | None, drafts: Sequence[NodeDraft]
) -> list[int]:
    """Return the ids of the new messages; a parent is a position in `drafts`, None means `root`."""
    ids: list[int] = []
    for draft in drafts:
        parent = root if draft.parent is None else ids[draft.parent]
        ids.append(_insert_node(execute, conversation, parent, draft))
    return ids


def _insert_pictures(execute: Execute, conversation: int, pictures: Pictures) -> None:
    for digest, data in pictures.items():
        execute("INSERT OR IGNORE INTO pictures VALUES (?, ?, ?)", conversation, digest, data)


def _insert_row(execute: Execute, table: str, columns: Mapping[str, Any]) -> int:
    places = ", ".join("?" * len(columns))
    added = execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", *columns.values())
    if added.lastrowid is None:
        raise StoreError(f"no row was added to {table}")
    return added.lastrowid


def _update_row(execute: Execute, table: str, id: int, columns: Mapping[str, Any]) -> None:
    if not columns:
        return
    if columns.keys() & {"title", "text"}:
        columns = {**columns, "indexed": 0}
    places = ", ".join(f"{name} = ?" for name in columns)
    if not execute(f"UPDATE {table} SET {places} WHERE id = ?", *columns.values(), id).rowcount:
        raise StoreError(f"{'message' if table == 'nodes' else 'conversation'} {id} no longer exists")


def _set_leaf(execute: Execute, conversation: int, node: int | None) -> None:
    execute("UPDATE conversations SET leaf = ? WHERE id = ?", node, conversation)


def _set_default_title(execute: Execute, conversation: int, text: str) -> None:
    """Set the title to the beginning of `text` if the conversation has none."""
    if execute("SELECT 1 FROM conversations WHERE id = ? AND title = ''", conversation).fetchone():
        _update_row(execute, "conversations", conversation, encode_columns({"title": make_title(text)}))
