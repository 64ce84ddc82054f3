"""A conversation as a file: Markdown, JSON or one HTML page out, the JSON back in.

JSON holds the whole tree and returns as it was; Markdown and HTML show one branch. An imported file is not
trusted: its size, form, numbers and depth are checked, and its ids marked as claimed. The page runs no script
and asks no network, whatever the messages hold.
"""

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard, get_args

from ..errors import StoreError, UsageError
from ..machine.files import read_json, write_whole
from .records import (
    MAX_IDS,
    Conversation,
    ConversationContent,
    ModelIdentity,
    Node,
    NodeContent,
    NodeDraft,
    Role,
    State,
)
from .store import Store

FORMAT, VERSION = "qchat-conversation", 1
MAX_IMPORT_NBYTES = 32 << 20
MAX_NODES = 100_000
MAX_DEPTH = 32
MAX_TIME = 1e11  # seconds since 1970: the year 5138
SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
PAGE = """<!doctype html>
<html lang="und">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1rem; margin: 2rem 0 .5rem }}
pre {{ font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }}
pre.code {{ font-family: ui-monospace, monospace; font-size: .9em }}
.user {{ border-left: .25rem solid; padding-left: 1rem }}
details, footer {{ opacity: .7 }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>{footer}</footer>
</body>
</html>
"""


def export_conversation(store: Store, conversation: int, path: Path, *, overwrite: bool = False) -> None:
    """Write the conversation to `path`, in the format that its suffix names: .md, .json, .html.

    Raises UsageError for another suffix or a file that is there already, StoreError for what cannot be read
    or written.
    """
    formats: dict[str, Callable[[Store, int], str]] = {
        ".md": lambda store, id: to_markdown(store.conversation(id), store.branch(id)),
        ".html": lambda store, id: to_html(store.conversation(id), store.branch(id)),
        ".json": lambda store, id: to_json(store.conversation(id), store.nodes(id)),
    }
    form = formats.get(path.suffix.lower())
    if form is None:
        raise UsageError(f"cannot export to {path.name}: its name must end with {', '.join(formats)}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already: choose another name")
    _write(path, form(store, conversation))


def to_markdown(conversation: Conversation, branch: Sequence[Node]) -> str:
    """The messages as their authors wrote them, under headings; thoughts quoted, calls and results fenced."""
    parts = [f"# {_heading(conversation)}", f"*{_footer(conversation)}*"]
    if system := _system(conversation, branch):
        parts += ["## System", system]
    for node in branch:
        parts.append(f"## {_speaker(node)}")
        if node.thinking:
            parts.append(
                "\n".join(f"> {line}".rstrip() for line in ["*Thought*", "", *node.thinking.split("\n")])
            )
        if node.text:
            parts.append(_fenced(node.text, "") if node.role == "tool" else node.text)
        parts += [_fenced(_indented(call), "json") for call in node.tool_calls]
    return "\n\n".join(parts) + "\n"


def to_html(conversation: Conversation, branch: Sequence[Node]) -> str:
    """One page with everything in it; thoughts are folded."""
    system = _system(conversation, branch)
    parts = [_section("system", "System", system)] if system else []
    parts += [_section(node.role, _speaker(node), node.text, node) for node in branch]
    return PAGE.format(
        title=_escaped(_heading(conversation)),
        body="\n".join(parts),
        footer=_escaped(_footer(conversation)),
    )


def to_json(conversation: Conversation, nodes: Sequence[Node]) -> str:
    """The whole tree, to be read by `import_conversation`."""
    about = asdict(conversation)
    for name in ("id", "imported", "updated"):
        del about[name]
    messages = [asdict(node) for node in nodes]
    for message in messages:
        del message["conversation"]
    document = {"format": FORMAT, "version": VERSION, **about, "nodes": messages}
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


def import_conversation(store: Store, path: Path) -> int:
    """Add the conversation in the file to the store; its id there.

    Raises StoreError naming the file and what in it is wrong; then nothing was added.
    """
    document = _Checked(read_json(path, StoreError, MAX_IMPORT_NBYTES), str(path))
    if _nests_deeper(document.value, MAX_DEPTH):
        raise StoreError(f"{path} nests deeper than {MAX_DEPTH} levels, which no exported conversation does")
    if document.value.get("format") != FORMAT:
        raise StoreError(f"{path} is not a conversation that qchat exported")
    version = document.number("version", 1, 1 << 31)
    if version > VERSION:
        raise StoreError(
            f"{path} was exported by a newer qchat (version {version}, this is {VERSION}): update qchat"
        )
    drafts, positions = _drafts(document)
    leaf = document.value.get("leaf")
    if leaf is not None and (not _is_whole(leaf) or leaf not in positions):
        raise StoreError(f"{path}: leaf is {leaf!r:.40}, wanted the id of one of its nodes")
    model = document.part("model")
    content = ConversationContent(
        title=document.text("title"),
        system=document.text("system"),
        settings=document.plain("settings", dict, {}),
        model=ModelIdentity(**{name: model.text(name) for name in ModelIdentity.__dataclass_fields__}),
    )
    return store.import_tree(
        content, drafts, None if leaf is None else positions[leaf], document.time("created")
    )


def _drafts(document: "_Checked") -> tuple[list[NodeDraft], dict[int, int]]:
    """The messages, and the position of each by its id in the file."""
    nodes = document.plain("nodes", list, [])
    if len(nodes) > MAX_NODES:
        raise StoreError(f"{document.where} has {len(nodes):,} messages, more than {MAX_NODES:,}")
    drafts: list[NodeDraft] = []
    positions: dict[int, int] = {}
    for position, value in enumerate(nodes):
        node = _Checked(value, f"{document.where}, message {position + 1}")
        id = node.number("id", 0, 1 << 62)
        if id in positions:
            raise StoreError(f"{node.where}: its id {id} is taken already")
        parent = node.value.get("parent")
        if parent is not None and (not _is_whole(parent) or parent not in positions):
            raise StoreError(f"{node.where}: parent is {parent!r:.40}, wanted the id of an earlier message")
        drafts.append(_draft(node, None if parent is None else positions[parent]))
        positions[id] = position
    return drafts, positions


def _draft(node: "_Checked", parent: int | None) -> NodeDraft:
    state = node.choice("state", get_args(State))
    content = NodeContent(
        text=node.text("text"),
        thinking=node.text("thinking"),
        tool_calls=node.tool_calls(),
        ids=node.token_ids("ids"),
        opener=node.token_ids("opener"),
        state="cancelled" if state == "streaming" else state,  # nobody is writing it any more
        settings=node.plain("settings", dict, {}),
        stats=node.plain("stats", dict, {}),
    )
    return NodeDraft(parent, node.choice("role", get_args(Role)), node.time("created"), content)


class _Checked:
    """An untrusted JSON object; `where` begins every error."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise StoreError(f"{where} is a JSON {type(value).__name__}, wanted an object")
        self.value: dict[str, Any] = value
        self.where = where

    def text(self, name: str) -> str:
        return self.plain(name, str, "")

    def choice(self, name: str, known: Sequence[Any]) -> Any:
        if self.text(name) not in known:
            raise self._wrong(name, f"one of {', '.join(known)}")
        return self.value[name]

    def number(self, name: str, low: int, high: int) -> int:
        value = self.value.get(name)
        if not _is_whole(value) or not low <= value < high:
            raise self._wrong(name, f"a whole number from {low} below {high}")
        return value

    def time(self, name: str) -> float:
        value = self.value.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_TIME:
            raise self._wrong(name, "seconds since 1970")
        return float(value)

    def part(self, name: str) -> "_Checked":
        return _Checked(self.value.get(name, {}), f"{self.where}: {name}")

    def plain(self, name: str, kind: type, default: Any) -> Any:
        value = self.value.get(name, default)
        if not isinstance(value, kind):
            raise self._wrong(name, {dict: "an object", list: "a list", str: "text"}[kind])
        return value

    def tool_calls(self) -> list[dict[str, Any]]:
        calls = self.plain("tool_calls", list, [])
        for call in calls:
            part = _Checked(call, f"{self.where}: a tool call")
            if not part.text("name"):
                raise StoreError(f"{part.where} names no function")
            part.plain("arguments", dict, {})
        return calls

    def token_ids(self, name: str) -> list[int]:
        ids = self.plain(name, list, [])
        if len(ids) > MAX_IDS:
            raise StoreError(f"{self.where} has {len(ids):,} {name}, more than {MAX_IDS:,}")
        for id in ids:
            if not _is_whole(id) or not 0 <= id < 1 << 32:
                raise StoreError(
                    f"{self.where}: {name} holds {id!r:.40}, wanted whole numbers from 0 below 2^32"
                )
        return ids

    def _wrong(self, name: str, wanted: str) -> StoreError:
        return StoreError(f"{self.where}: {name} is {self.value.get(name)!r:.40}, wanted {wanted}")


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _nests_deeper(value: Any, levels: int) -> bool:
    containers = [value]
    for _ in range(levels):
        containers = [
            inner
            for outer in containers
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(containers)


def _write(path: Path, text: str) -> None:
    """All of `text` or nothing, readable by this user only."""
    try:
        write_whole(path, text, mode=0o600)
    except OSError as problem:
        raise StoreError(f"cannot write {path}: {problem.strerror or problem}") from problem


def _heading(conversation: Conversation) -> str:
    return " ".join(conversation.title.split()) or "Conversation"


def _system(conversation: Conversation, branch: Sequence[Node]) -> str:
    """The system message, where the branch does not begin with one."""
    return "" if any(node.role == "system" for node in branch) else conversation.system


def _footer(conversation: Conversation) -> str:
    begun = datetime.fromtimestamp(conversation.created, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return " · ".join(part for part in (conversation.model.name, begun) if part)


def _speaker(node: Node) -> str:
    return SPEAKERS[node.role] + (" (stopped)" if node.state != "complete" else "")


def _indented(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any that `text` holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _section(role: str, speaker: str, text: str, node: Node | None = None) -> str:
    parts = [f"<h2>{_escaped(speaker)}</h2>"]
    if node and node.thinking:
        parts.append(f"<details><summary>Thought</summary>{_block(node.thinking)}</details>")
    if text:
        parts.append(_block(text, code=role == "tool"))
    parts += [_block(_indented(call), code=True) for call in (node.tool_calls if node else [])]
    return f'<section class="{role}">\n' + "\n".join(parts) + "\n</section>"


def _block(text: str, *, code: bool = False) -> str:
    # a browser drops one newline after <pre>
    attribute = ' class="code"' if code else ""
    return f"<pre{attribute}>\n{_escaped(text)}</pre>"


def _escaped(text: str) -> str:
    """Without the control characters that HTML does not allow."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text))
