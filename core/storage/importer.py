"""Reading a conversation from a JSON file that `export.py` wrote.

The file is not trusted: its size, structure, numbers and nesting are checked. Its token ids are stored but
marked as imported, since they cannot be verified.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard, get_args

from ..errors import StoreError
from ..machine.files import parse_json, read_text
from ..quoting import quote_value
from .export import FORMAT, VERSION
from .records import (
    MAX_IDS,
    MAX_RESULT_NBYTES,
    MAX_TIME,
    ConversationContent,
    ModelIdentity,
    NodeContent,
    NodeDraft,
    NodeState,
    Role,
    check_images,
    result_nbytes,
)
from .store import Store

MAX_IMPORT_NBYTES = 32 << 20
MAX_NODES = 100_000
MAX_DEPTH = 32
MAX_INTEGER_BITS = 1000  # what a float can still hold


def import_conversation(store: Store, path: Path) -> int:
    """Add the conversation in the file to the store and return its id there.

    Raises StoreError with the file and its first fault; nothing is added then.
    """
    text = read_text(path, StoreError, MAX_IMPORT_NBYTES)
    document = _UntrustedObject(parse_json(text, str(path), StoreError, any_integer=True), str(path))
    levels = _containers_by_level(document.value, MAX_DEPTH + 1)
    if levels[MAX_DEPTH]:
        raise StoreError(f"{path} is not a valid export: it nests deeper than {MAX_DEPTH} levels")
    if document.value.get("format") != FORMAT:
        raise StoreError(f"{path} is not a conversation exported by qchat")
    version = document.number("version", 1, 1 << 31)
    if version > VERSION:
        raise StoreError(
            f"{path} was exported by a newer qchat (format {version}, not {VERSION}): update qchat"
        )
    drafts, positions = _parse_messages(document)
    leaf = document.value.get("leaf")
    if leaf is not None and (not _is_integer(leaf) or leaf not in positions):
        raise StoreError(f"{path}: leaf is {quote_value(leaf)}, wanted the id of a message")
    model = document.object("model")
    identity = ModelIdentity(**{name: model.text(name) for name in ModelIdentity.__dataclass_fields__})
    content = ConversationContent(
        title=document.text("title"),
        system=document.text("system"),
        settings=document.value_of("settings", dict, {}),
        model=replace(identity, folder=""),  # a file from elsewhere chooses no folder to open here
    )
    created = document.time("created")
    if any(_is_huge(value) for level in levels for container in level for value in _values(container)):
        raise StoreError(f"{path} holds a number that is out of range")
    results, pictures = _parse_results(document), _parse_pictures(document)
    place = None if leaf is None else positions[leaf]
    conversation = store.import_tree(content, drafts, place, created, pictures)
    for result in results:
        store.add_result(conversation, **result)
    return conversation


def _parse_pictures(document: "_UntrustedObject") -> dict[str, bytes]:
    """Return the files of the pictures by digest. Raises StoreError for one that is damaged."""
    pictures: dict[str, bytes] = {}
    for digest, text in document.value_of("pictures", dict, {}).items():
        try:
            pictures[digest] = base64.b64decode(text, validate=True)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{document.where}: a picture is not in base64") from error
        if hashlib.sha256(pictures[digest]).hexdigest() != digest:
            raise StoreError(f"{document.where}: the picture {quote_value(digest)} is damaged")
    return pictures


def _parse_results(document: "_UntrustedObject") -> list[dict[str, Any]]:
    """Return the results in the file, as what `Store.add_result` takes. Raises StoreError."""
    results = []
    for position, value in enumerate(document.value_of("results", list, [])):
        given = _UntrustedObject(value, f"{document.where}, result {position + 1}")
        result = {
            "turn": given.number("turn", 0, MAX_NODES),
            "title": given.text("title"),
            "text": given.text("text"),
            "parts": given.value_of("parts", list, []),
        }
        if result_nbytes(result["title"], result["text"], result["parts"]) > MAX_RESULT_NBYTES:
            raise StoreError(f"{given.where} is larger than {MAX_RESULT_NBYTES >> 10} KiB")
        results.append(result)
    return results


def _parse_messages(document: "_UntrustedObject") -> tuple[list[NodeDraft], dict[int, int]]:
    """Return the messages, and the position of each by its id in the file."""
    nodes = document.value_of("nodes", list, [])
    if len(nodes) > MAX_NODES:
        raise StoreError(f"{document.where} has {len(nodes):,} messages, more than {MAX_NODES:,}")
    drafts: list[NodeDraft] = []
    positions: dict[int, int] = {}
    for position, value in enumerate(nodes):
        node = _UntrustedObject(value, f"{document.where}, message {position + 1}")
        id = node.number("id", 0, 1 << 62)
        if id in positions:
            raise StoreError(f"{node.where}: id {id} is not unique")
        parent = node.value.get("parent")
        if parent is not None and (not _is_integer(parent) or parent not in positions):
            raise StoreError(
                f"{node.where}: parent is {quote_value(parent)}, wanted the id of an earlier message"
            )
        drafts.append(_parse_message(node, None if parent is None else positions[parent]))
        positions[id] = position
    return drafts, positions


def _parse_message(node: "_UntrustedObject", parent: int | None) -> NodeDraft:
    state = node.choice("state", get_args(NodeState))
    content = NodeContent(
        text=node.text("text"),
        thinking=node.text("thinking"),
        tool_calls=node.tool_calls(),
        ids=node.token_ids("ids"),
        opener=node.token_ids("opener"),
        state="cancelled" if state == "streaming" else state,  # no process writes it any longer
        settings=node.value_of("settings", dict, {}),
        stats=node.value_of("stats", dict, {}),
        model_name=node.text("model_name"),
        images=node.images(),
    )
    return NodeDraft(parent, node.choice("role", get_args(Role)), node.time("created"), content)


class _UntrustedObject:
    """A JSON object whose fields are checked when read; every error message begins with `where`."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise StoreError(f"{where} is a JSON {type(value).__name__}, wanted an object")
        self.value: dict[str, Any] = value
        self.where = where

    def text(self, name: str) -> str:
        return self.value_of(name, str, "")

    def choice(self, name: str, known: Sequence[Any]) -> Any:
        if self.text(name) not in known:
            raise self._error(name, f"one of {', '.join(known)}")
        return self.value[name]

    def number(self, name: str, low: int, high: int) -> int:
        value = self.value.get(name)
        if not _is_integer(value) or not low <= value < high:
            raise self._error(name, f"an integer from {low} to {high - 1}")
        return value

    def time(self, name: str) -> float:
        value = self.value.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_TIME:
            raise self._error(name, "seconds since 1970")
        return float(value)

    def object(self, name: str) -> "_UntrustedObject":
        return _UntrustedObject(self.value.get(name, {}), f"{self.where}: {name}")

    def value_of(self, name: str, kind: type, default: Any) -> Any:
        value = self.value.get(name, default)
        if not isinstance(value, kind):
            raise self._error(name, {dict: "an object", list: "a list", str: "text"}[kind])
        return value

    def tool_calls(self) -> list[dict[str, Any]]:
        calls = self.value_of("tool_calls", list, [])
        for call in calls:
            checked = _UntrustedObject(call, f"{self.where}: a tool call")
            if not checked.text("name"):
                raise StoreError(f"{checked.where} has no function name")
            checked.value_of("arguments", dict, {})
        return calls

    def images(self) -> list[dict[str, Any]]:
        images = self.value_of("images", list, [])
        try:
            check_images(images, len(self.text("text")))
        except ValueError as error:
            raise StoreError(f"{self.where}: {error}") from error
        return images

    def token_ids(self, name: str) -> list[int]:
        ids = self.value_of(name, list, [])
        if len(ids) > MAX_IDS:
            raise StoreError(f"{self.where} has {len(ids):,} {name}, more than {MAX_IDS:,}")
        for id in ids:
            if not _is_integer(id) or not 0 <= id < 1 << 32:
                raise StoreError(
                    f"{self.where}: {name} contains {quote_value(id)}, wanted integers from 0 to 2^32 - 1"
                )
        return ids

    def _error(self, name: str, wanted: str) -> StoreError:
        return StoreError(f"{self.where}: {name} is {quote_value(self.value.get(name))}, wanted {wanted}")


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _containers_by_level(value: Any, levels: int) -> list[list[Any]]:
    """Return the objects and lists in `value`, level by level: a recursive walk could overflow the stack."""
    found = [[value]]
    while len(found) < levels:
        inner = [inner for outer in found[-1] for inner in _values(outer) if isinstance(inner, dict | list)]
        found.append(inner)
    return found


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS
