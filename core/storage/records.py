"""The records of a conversation and their encoding in tables: the schema, JSON columns, packed token ids.

Owns the schema versions: to change the schema, append to MIGRATIONS; never edit an entry.
"""

import json
import re
import sys
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from sqlite3 import Row
from typing import Any, Literal, TypedDict

from ..events import Done
from ..machine.files import parse_json_value

Role = Literal["system", "user", "assistant", "tool"]
NodeState = Literal["complete", "streaming", "cancelled"]
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
            created REAL NOT NULL,   -- seconds since 1970, like all times here
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
            ids BLOB NOT NULL DEFAULT x'',          -- little-endian u32, compressed with zlib
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
    (
        "ALTER TABLE nodes ADD COLUMN model_name TEXT NOT NULL DEFAULT ''",  # of the model that replied
        "CREATE INDEX nodes_by_model ON nodes (conversation, model_name)",
    ),
    (
        """CREATE TABLE results (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            turn INTEGER NOT NULL,
            title TEXT NOT NULL,
            text TEXT NOT NULL,
            parts TEXT NOT NULL,     -- JSON list
            created REAL NOT NULL
        )""",
        "CREATE INDEX results_by_conversation ON results (conversation)",
    ),
    (
        "ALTER TABLE nodes ADD COLUMN images TEXT NOT NULL DEFAULT '[]'",  # JSON list
        """CREATE TABLE pictures (
            conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            digest TEXT NOT NULL,    -- SHA-256 of the file
            data BLOB NOT NULL,
            PRIMARY KEY (conversation, digest)
        )""",
    ),
)
MAX_IDS = 1 << 24
MAX_IMAGE_TOKENS = 1 << 16
DIGEST = re.compile("[0-9a-f]{64}")
ID_COLUMNS = ("ids", "opener")
TEXT_FIELDS = ("text", "thinking", "raw_text", "tool_calls", "stop_string")
TITLE_CHARACTERS = 60
MAX_RESULT_NBYTES, MAX_RESULTS_NBYTES = 256 << 10, 4 << 20  # of one result; of a conversation's results
MAX_TIME = 1e11  # seconds since 1970: the year 5138
RESULT_COLUMNS = {
    **dict.fromkeys(("title", "text"), str),
    **dict.fromkeys(("id", "turn"), int),
    "parts": list,
    "created": float,
}
CONVERSATION_COLUMNS = {
    **dict.fromkeys(("title", "system"), str),
    **dict.fromkeys(("settings", "model"), dict),
    **dict.fromkeys(("id", "imported"), int),
    **dict.fromkeys(("created", "updated"), float),
    "leaf": int | None,
}
NODE_COLUMNS = {
    **dict.fromkeys(("role", "text", "thinking", "state", "model_name"), str),
    **dict.fromkeys(("settings", "stats"), dict),
    **dict.fromkeys(("tool_calls", "ids", "opener", "images"), list),
    **dict.fromkeys(("id", "conversation"), int),
    "created": float,
    "parent": int | None,
}


@dataclass(frozen=True)
class ModelIdentity:
    """The model of a conversation; unknown hashes are empty.

    Token ids are interchangeable between models with the same tokenizer hash and template hash.
    """

    name: str = ""
    folder: str = ""
    config_hash: str = ""
    weights: str = ""
    template_hash: str = ""
    tokenizer_hash: str = ""


@dataclass(frozen=True)
class Conversation:
    """One conversation; times are in seconds since 1970. `model` is the one it was last held with.

    `leaf` is the last node of the current branch. The token ids of an `imported` conversation come from a
    file and are not verified.
    """

    id: int
    title: str
    system: str
    settings: dict[str, Any]
    model: ModelIdentity
    imported: bool
    leaf: int | None
    created: float
    updated: float
    damaged: bool = False  # its row cannot be read: only `id` is known, and that it can be deleted


@dataclass(frozen=True)
class Node:
    """One message; `created` is in seconds since 1970.

    `ids` are the message's token ids; if several messages form one question, the last one holds them all.
    `opener` holds the template's token ids right before a reply. Each tool call has a name and arguments.
    `model_name` names the model that wrote a reply; it is empty for questions and where nothing was noted.
    `images` are the pictures in the text: digest, name, rows and columns of tokens, and place.
    """

    id: int
    conversation: int
    parent: int | None
    role: Role
    text: str
    thinking: str
    tool_calls: list[dict[str, Any]]
    ids: list[int]
    state: NodeState
    settings: dict[str, Any]
    stats: dict[str, Any]
    created: float
    opener: list[int] = field(default_factory=list)
    model_name: str = ""
    images: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class KeptResult:
    """What a job or a command found out, shown after turn number `turn`; never part of a prompt.

    `text` says it in words; `parts` are for the front end, which draws them.
    """

    id: int
    turn: int
    title: str
    text: str
    parts: list[Any]
    created: float


@dataclass(frozen=True)
class Hit:
    """A search result; `node` is None if the title matched."""

    conversation: int
    title: str
    node: int | None
    role: Role | None
    snippet: str


class NodeContent(TypedDict, total=False):
    """The mutable fields of a `Node`."""

    text: str
    thinking: str
    tool_calls: Sequence[Mapping[str, Any]]
    ids: Sequence[int]
    opener: Sequence[int]
    state: NodeState
    settings: Mapping[str, Any]
    stats: Mapping[str, Any]
    model_name: str
    images: Sequence[Mapping[str, Any]]


class ConversationContent(TypedDict, total=False):
    """The mutable fields of a `Conversation`."""

    title: str
    system: str
    settings: Mapping[str, Any]
    model: ModelIdentity


@dataclass(frozen=True)
class NodeDraft:
    """A message that is not stored yet; `parent` is the position of another draft in the same list."""

    parent: int | None
    role: Role
    created: float
    content: NodeContent = field(default_factory=NodeContent)


def reply_stats(done: Done) -> dict[str, Any]:
    """Return the fields of `done` that a node stores as statistics: all but texts and tool calls."""
    return {name: value for name, value in asdict(done).items() if name not in TEXT_FIELDS}


def make_title(text: str) -> str:
    """Return the beginning of the first paragraph of `text` as a one-line title."""
    line = " ".join(text.strip().partition("\n\n")[0].split())
    return line if len(line) <= TITLE_CHARACTERS else f"{line[: TITLE_CHARACTERS - 1]}…"


def pack_ids(ids: Sequence[int]) -> bytes:
    """Encode ids as little-endian u32, compressed with zlib. Raises OverflowError for an id out of range."""
    return zlib.compress(_little_endian(array("I", ids)).tobytes(), 1) if len(ids) else b""


def unpack_ids(packed: bytes) -> list[int]:
    """Decode the bytes of `pack_ids`. Raises ValueError or zlib.error for damaged bytes."""
    if not packed:
        return []
    ids = array("I")
    decoder = zlib.decompressobj()
    ids.frombytes(decoder.decompress(packed, MAX_IDS * ids.itemsize))
    if not decoder.eof:
        raise ValueError(f"the ids are truncated or more than {MAX_IDS:,}")
    return _little_endian(ids).tolist()


def _little_endian(ids: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def encode_columns(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `content` as SQLite stores them."""
    return {name: _encode(name, value) for name, value in content.items()}


def _encode(name: str, value: Any) -> Any:
    if name in ID_COLUMNS:
        return pack_ids(value)
    if name == "model":
        return json.dumps(asdict(value))
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8 form
    return json.dumps(value, allow_nan=False, default=str)


def result_nbytes(title: str, text: str, parts: Sequence[Any]) -> int:
    """Return the bytes that a result takes in the store."""
    columns = encode_columns({"title": title, "text": text, "parts": list(parts)})
    return sum(len(value.encode()) for value in columns.values())


def parse_conversation(row: Row) -> Conversation:
    """Build a conversation from its row. Raises ValueError for damaged data."""
    columns = _decode_columns(row, CONVERSATION_COLUMNS)
    known = {item.name for item in fields(ModelIdentity)}
    model = {name: _checked(value, str, name) for name, value in columns["model"].items() if name in known}
    return Conversation(**columns | {"imported": bool(row["imported"]), "model": ModelIdentity(**model)})


def damaged_conversation(id: int) -> Conversation:
    """What stands in a list for a conversation whose row cannot be read."""
    title = f"(damaged, delete it: qchat sessions rm {id})"
    return Conversation(id, title, "", {}, ModelIdentity(), True, None, 0.0, 0.0, damaged=True)


def parse_node(row: Row) -> Node:
    """Build a node from its row. Raises ValueError or zlib.error for damaged data."""
    node = Node(**_decode_columns(row, NODE_COLUMNS))
    for call in node.tool_calls:
        _checked(_checked(call, dict, "tool_calls").get("name"), str, "tool_calls")
        _checked(call.get("arguments", {}), dict, "tool_calls")
    check_images(node.images, len(node.text))
    return node


def check_images(images: Sequence[Any], characters: int) -> None:
    """Check the pictures of a text of so many characters. Raises ValueError."""
    begin = 0
    for image in images:
        fields = _checked(image, dict, "images")
        if not DIGEST.fullmatch(_checked(fields.get("digest"), str, "images")):
            raise ValueError("images has a digest that is none")
        _checked(fields.get("name"), str, "images")
        sizes = [fields.get(name) for name in ("rows", "columns", "at")]
        if not all(type(size) is int for size in sizes):
            raise ValueError("images has a size that is no number")
        rows, columns, at = sizes
        if not (0 < rows * columns <= MAX_IMAGE_TOKENS and rows > 0 and begin <= at <= characters):
            raise ValueError("images has a number out of range")
        begin = at


def parse_result(row: Row) -> KeptResult | None:
    """Build a result from its row; None for damaged data."""
    try:
        return KeptResult(**_decode_columns(row, RESULT_COLUMNS))
    except ValueError:
        return None


def _decode_columns(row: Row, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoded columns of `row` that `kinds` names: SQLite keeps any type in any column."""
    columns = {name: row[name] for name in kinds}
    for name in columns.keys() & {"settings", "stats", "tool_calls", "model", "parts", "images"}:
        columns[name] = parse_json_value(_checked(columns[name], str, name), any_integer=True)
    for name in columns.keys() & set(ID_COLUMNS):
        columns[name] = unpack_ids(_checked(columns[name], bytes, name))
    return {name: _checked(value, kinds[name], name) for name, value in columns.items()}


def _checked(value: Any, kind: Any, name: str) -> Any:
    """`value`, if it is a `kind`. Raises ValueError."""
    if not isinstance(value, kind) or (kind is float and not 0 <= value <= MAX_TIME):
        raise ValueError(f"{name} is a {type(value).__name__}")
    return value
