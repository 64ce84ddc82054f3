"""Writing a conversation to a file: Markdown, JSON or one HTML page.

JSON holds the whole tree, for `importer.py` to read back; Markdown and HTML hold one branch. The HTML page
lays out the Markdown of answers; it runs no script and loads nothing, whatever the messages contain.
"""

import base64
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StoreError, UsageError
from ..machine.files import write_whole
from .records import Conversation, KeptResult, Node
from .store import NO_PICTURES, Store

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

CONTROLS, REPLACEMENT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"), "\ufffd"
FORMAT, VERSION = "qchat-conversation", 1
SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
PAGE = """<!doctype html>
<html lang="und">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1rem; margin: 2rem 0 .5rem }}
pre {{ font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }}
pre.code, code {{ font-family: ui-monospace, monospace; font-size: .9em }}
pre:has(code) {{ background: color-mix(in srgb, currentColor 8%, transparent) }}
pre:has(code), blockquote {{ margin: 1rem 0; padding: .5rem 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ border: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .25rem .6rem }}
blockquote {{ border-left: .25rem solid color-mix(in srgb, currentColor 25%, transparent) }}
.user {{ border-left: .25rem solid; padding-left: 1rem }}
details, footer {{ opacity: .7 }}
img {{ max-width: 100% }}
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
    """Write the conversation to `path` in the format of its suffix: .md, .html or .json.

    Raises UsageError for another suffix or an existing file, StoreError if reading or writing fails.
    """
    formats: dict[str, Callable[[Store, int], str]] = {
        ".md": lambda store, id: to_markdown(*_parts(store, id)),
        ".html": lambda store, id: to_html(*_parts(store, id)),
        ".json": lambda store, id: to_json(
            store.conversation(id), store.nodes(id), store.results(id), store.pictures(id)
        ),
    }
    render = formats.get(path.suffix.lower())
    if render is None:
        raise UsageError(f"cannot export to {path.name}: the name must end with {', '.join(formats)}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} already exists: choose another name")
    _write(path, render(store, conversation))


def _parts(store: Store, id: int) -> tuple[Conversation, list[Node], list[KeptResult], dict[str, bytes]]:
    """Return what a page shows of a conversation."""
    return store.conversation(id), store.branch(id), store.results(id), store.pictures(id)


def to_markdown(
    conversation: Conversation,
    branch: Sequence[Node],
    results: Sequence[KeptResult] = (),
    pictures: Mapping[str, bytes] = NO_PICTURES,
) -> str:
    """Render the messages verbatim under headings, and the results of jobs after them.

    Reasoning is quoted; tool calls and results are fenced; pictures are part of the text, by data URLs.
    """
    parts = [f"# {_heading(conversation)}", f"*{_footer(conversation, branch)}*"]
    if system := _system(conversation, branch):
        parts += ["## System", system]
    for node, speaker in zip(branch, _speakers(branch), strict=True):
        parts.append(f"## {speaker}")
        if node.thinking:
            parts.append(
                "\n".join(f"> {line}".rstrip() for line in ["*Thought*", "", *node.thinking.split("\n")])
            )
        parts += [f"![{name}]({url})" for name, url in _shown(node, pictures)]
        if node.text:
            parts.append(_fence(node.text, "") if node.role == "tool" else node.text)
        parts += [_fence(_indent_json(call), "json") for call in node.tool_calls]
    for result in results:
        parts += [f"## {_line(result.title)}", f"*{_after(result)}*", _fence(result.text, "")]
    return "\n\n".join(parts) + "\n"


def to_html(
    conversation: Conversation,
    branch: Sequence[Node],
    results: Sequence[KeptResult] = (),
    pictures: Mapping[str, bytes] = NO_PICTURES,
) -> str:
    """Render one self-contained page; reasoning is collapsed, answers are laid out by their Markdown."""
    system = _system(conversation, branch)
    parts = [_section("system", "System", system)] if system else []
    speakers = _speakers(branch)
    parts += [
        _section(node.role, who, node.text, node, pictures)
        for node, who in zip(branch, speakers, strict=True)
    ]
    parts += map(_result_section, results)
    return PAGE.format(
        policy=POLICY + ("; img-src data:" if any(_shown(node, pictures) for node in branch) else ""),
        title=_escape(_heading(conversation)),
        body="\n".join(parts),
        footer=_escape(_footer(conversation, branch)),
    )


def to_json(
    conversation: Conversation,
    nodes: Sequence[Node],
    results: Sequence[KeptResult] = (),
    pictures: Mapping[str, bytes] = NO_PICTURES,
) -> str:
    """Serialize the whole tree, for `import_conversation` to read."""
    header = asdict(conversation)
    for name in ("id", "imported", "updated"):
        del header[name]
    del header["model"]["folder"]  # of this machine
    messages = [asdict(node) for node in nodes]
    for message in messages:
        del message["conversation"]
    kept = [{name: value for name, value in asdict(result).items() if name != "id"} for result in results]
    document = {"format": FORMAT, "version": VERSION, **header, "nodes": messages, "results": kept}
    if pictures:
        document["pictures"] = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    """Write the file atomically, readable by this user only."""
    try:
        write_whole(path, text, mode=0o600)
    except OSError as problem:
        raise StoreError(f"cannot write {path}: {problem.strerror or problem}") from problem


def _heading(conversation: Conversation) -> str:
    return _line(conversation.title) or "Conversation"


def _system(conversation: Conversation, branch: Sequence[Node]) -> str:
    """Return the conversation's system message, unless the branch has one of its own."""
    return "" if any(node.role == "system" for node in branch) else conversation.system


def _footer(conversation: Conversation, branch: Sequence[Node]) -> str:
    created = datetime.fromtimestamp(conversation.created, UTC).strftime("%Y-%m-%d %H:%M UTC")
    models = ", ".join(dict.fromkeys(_line(node.model_name) for node in branch if node.model_name))
    return " · ".join(part for part in (models or conversation.model.name, created) if part)


def _speakers(branch: Sequence[Node]) -> list[str]:
    """Return who wrote each message; the model is named where it is another one than before."""
    speakers, model = [], ""
    for node in branch:
        named = f" · {_line(node.model_name)}" if node.model_name not in ("", model) else ""
        model = node.model_name or model
        speakers.append(SPEAKERS[node.role] + (" (stopped)" if node.state != "complete" else "") + named)
    return speakers


def _after(result: KeptResult) -> str:
    return f"A result, after turn {result.turn}" if result.turn else "A result, before the first turn"


def _result_section(result: KeptResult) -> str:
    head, body = f"{_after(result)}: {_line(result.title)}", _block(result.text, code=True)
    return (
        f'<section class="result">\n<details><summary>{_escape(head)}</summary>{body}</details>\n</section>'
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _indent_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _fence(text: str, language: str) -> str:
    """Return a code block whose fence is longer than any in `text`."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _shown(node: Node, pictures: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Return names and data URLs of the pictures in a message."""
    found: list[tuple[str, str]] = []
    for image in node.images:
        data = pictures.get(image["digest"], b"")
        if kind := _media_type(data):
            name = re.sub(r"[^\w .-]", "", _line(image["name"]))  # it ends no link
            found.append((name, f"data:{kind};base64,{base64.b64encode(data).decode()}"))
    return found


def _media_type(data: bytes) -> str:
    """Return the media type of a picture file; empty for others."""
    marks = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
    kind = next((kind for mark, kind in marks.items() if data.startswith(mark)), "")
    kind = "webp" if data[8:12] == b"WEBP" else "avif" if data[4:12] == b"ftypavif" else kind
    return f"image/{kind}" if kind else ""


def _section(
    role: str,
    speaker: str,
    text: str,
    node: Node | None = None,
    pictures: Mapping[str, bytes] = NO_PICTURES,
) -> str:
    parts = [f"<h2>{_escape(speaker)}</h2>"]
    if node and node.thinking:
        parts.append(f"<details><summary>Thought</summary>{_block(node.thinking)}</details>")
    shown = _shown(node, pictures) if node else []
    parts += [f'<p><img alt="{_escape(name)}" src="{url}"></p>' for name, url in shown]
    if text:
        parts.append(_laid_out(text) if role == "assistant" else _block(text, code=role == "tool"))
    parts += [_block(_indent_json(call), code=True) for call in (node.tool_calls if node else [])]
    return f'<section class="{role}">\n' + "\n".join(parts) + "\n</section>"


def _laid_out(text: str) -> str:
    """Return an answer's Markdown as HTML. Tags in it are text, and pictures links: a page loads nothing."""
    return _markdown().render(CONTROLS.sub(REPLACEMENT, text)).rstrip("\n")


@cache
def _markdown() -> "MarkdownIt":
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("image")


def _block(text: str, *, code: bool = False) -> str:
    # a browser drops one newline after <pre>
    attribute = ' class="code"' if code else ""
    return f"<pre{attribute}>\n{_escape(text)}</pre>"


def _escape(text: str) -> str:
    """Escape `text` for HTML and replace control characters that HTML does not allow."""
    return html.escape(CONTROLS.sub(REPLACEMENT, text))
