"""What conversations consist of, and how it lies in tables: the schema, JSON columns, packed ids.

Owns the schema's versions: a change is a new entry at the end of MIGRATIONS, never an edit of one.
"""

import json
import sys
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from sqlite3 import Row
from typing import Any, Literal, TypedDict

from ..events import Done

Role = Literal["system", "user", "assistant", "tool"]
State = Literal["complete", "streaming", "cancelled"]
APPLICATION_ID = 0x71636874  # "qcht"
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE conversations (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            title TEXT NOT NULL,
            system TEXT NOT NULL,
            settings TEXT NOT NULL,  -- JSON object
            model TEXT NOT NULL,     -- JSON object, the fields of ModelIdentity
            imported INTEGER NOT NULL,
            leaf INTEGER,
            created REAL NOT NULL,   -- seconds since 1970, as all times here
            updated REAL NOT NULL,
            deleted REAL,
            indexed INTEGER NOT NULL DEFAULT 0,
            FOREIGN KEY (id, leaf) REFERENCES nodes (conversation, id)
        )""",
        """CREATE TABLE nodes (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            parent INTEGER CHECK (parent < id),
            role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant', 'tool')),
            text TEXT NOT NULL DEFAULT '',
            thinking TEXT NOT NULL DEFAULT '',
            tool_calls TEXT NOT NULL DEFAULT '[]',  -- JSON list
            ids BLOB NOT NULL DEFAULT x'',          -- little-endian u32 through zlib
            state TEXT NOT NULL DEFAULT 'complete' CHECK (state IN ('complete', 'streaming', 'cancelled')),
            settings TEXT NOT NULL DEFAULT '{}',    -- JSON object
            stats TEXT NOT NULL DEFAULT '{}',       -- JSON object
            created REAL NOT NULL,
            indexed INTEGER NOT NULL DEFAULT 0,
            UNIQUE (conversation, id),
            FOREIGN KEY (conversation, parent) REFERENCES nodes (conversation, id)
        )""",
        "CREATE INDEX nodes_by_parent ON nodes (conversation, parent)",
        "CREATE INDEX conversations_by_time ON conversations (updated)",
        "CREATE INDEX conversations_to_index ON conversations (id) WHERE NOT indexed",
        "CREATE INDEX nodes_to_index ON nodes (id) WHERE NOT indexed",
    ),
    ("ALTER TABLE nodes ADD COLUMN opener BLOB NOT NULL DEFAULT x''",),
)
MAX_IDS = 1 << 24
ID_LISTS = ("ids", "opener")
PARTS_OF_DONE = ("text", "thinking", "raw_text", "tool_calls")
TITLE_CHARACTERS = 60


@dataclass(frozen=True)
class ModelIdentity:
    """What a conversation was held with; hashes are text, empty where unknown. Ids mean the same wherever the
    hashes of tokenizer and template do."""

    name: str = ""
    folder: str = ""
    config_hash: str = ""
    weights: str = ""
    template_hash: str = ""
    tokenizer_hash: str = ""


@dataclass(frozen=True)
class Conversation:
    """`leaf` is the node that the user is at; times in seconds since 1970. Of an `imported` one the ids are
    what a file claimed."""

    id: int
    title: str
    system: str
    settings: dict[str, Any]
    model: ModelIdentity
    imported: bool
    leaf: int | None
    created: float
    updated: float


@dataclass(frozen=True)
class Node:
    """One message. `ids` are those authored for it; of several in one question the last has all.

    `opener` are the template's ids right before a reply; `tool_calls` are objects with name and arguments.
    """

    id: int
    conversation: int
    parent: int | None
    role: Role
    text: str
    thinking: str
    tool_calls: list[dict[str, Any]]
    ids: list[int]
    state: State
    settings: dict[str, Any]
    stats: dict[str, Any]
    created: float
    opener: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Hit:
    """A place where the search words were found; `node` is None for the title."""

    conversation: int
    title: str
    node: int | None
    role: Role | None
    snippet: str


class NodeContent(TypedDict, total=False):
    """What of a node may change, named as in `Node`."""

    text: str
    thinking: str
    tool_calls: Sequence[Mapping[str, Any]]
    ids: Sequence[int]
    opener: Sequence[int]
    state: State
    settings: Mapping[str, Any]
    stats: Mapping[str, Any]


class ConversationContent(TypedDict, total=False):
    """What of a conversation may change, named as in `Conversation`."""

    title: str
    system: str
    settings: Mapping[str, Any]
    model: ModelIdentity


@dataclass(frozen=True)
class NodeDraft:
    """A message that is not stored yet: its place among others by their position, its content."""

    parent: int | None
    role: Role
    created: float
    content: NodeContent = field(default_factory=NodeContent)


def stats_of(done: Done) -> dict[str, Any]:
    """What a node keeps of a reply's end: all but the texts and calls, which it has."""
    return {name: value for name, value in asdict(done).items() if name not in PARTS_OF_DONE}


def title_of(text: str) -> str:
    """The beginning of `text` as a conversation's title."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE_CHARACTERS else f"{line[: TITLE_CHARACTERS - 1]}…"


def pack_ids(ids: Sequence[int]) -> bytes:
    """Little-endian u32 through zlib; raises OverflowError for what is no u32."""
    return zlib.compress(_little_endian(array("I", ids)).tobytes(), 1) if len(ids) else b""


def unpack_ids(packed: bytes) -> list[int]:
    """The inverse of `pack_ids`; raises ValueError or zlib.error for damaged bytes."""
    if not packed:
        return []
    ids = array("I")
    decoder = zlib.decompressobj()
    ids.frombytes(decoder.decompress(packed, MAX_IDS * ids.itemsize))
    if not decoder.eof:
        raise ValueError(f"the ids are cut off or more than {MAX_IDS:,}")
    return _little_endian(ids).tolist()


def _little_endian(ids: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def encoded(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _encode(name, value) for name, value in content.items()}


def _encode(name: str, value: Any) -> Any:
    if name in ID_LISTS:
        return pack_ids(value)
    if name == "model":
        return json.dumps(asdict(value))
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # half a surrogate pair has no UTF-8
    return json.dumps(value, allow_nan=False, default=str)


def conversation_of(row: Row) -> Conversation:
    """Raises ValueError, TypeError or AttributeError for damaged columns."""
    columns = _decoded(row, Conversation)
    known = {item.name for item in fields(ModelIdentity)}
    model = {name: value for name, value in columns["model"].items() if name in known}
    return Conversation(**columns | {"imported": bool(row["imported"]), "model": ModelIdentity(**model)})


def node_of(row: Row) -> Node:
    """Raises ValueError, TypeError or zlib.error for damaged columns."""
    return Node(**_decoded(row, Node))


def _decoded(row: Row, kind: type) -> dict[str, Any]:
    """The row's columns that are fields of `kind`."""
    columns = {item.name: row[item.name] for item in fields(kind)}
    for name in columns.keys() & {"settings", "stats", "tool_calls", "model"}:
        columns[name] = json.loads(columns[name])
    for name in columns.keys() & set(ID_LISTS):
        columns[name] = unpack_ids(columns[name])
    return columns
