"""Markdown as a tree of blocks: CommonMark with tables and strikethrough; mathematics stays as written.

HTML and reference definitions are text like any other: no block means another thing once others follow it.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token
    from markdown_it.tree import SyntaxTreeNode as Node

LISTS = ("bullet_list", "ordered_list")
WIDTH_ROWS = 40  # of a table decide the widths of its columns, so that what follows never changes them
_MAX_NESTING = 24
_MATH = re.compile(
    r"\$\$(?:[^$\\]|\\.){1,2000}\$\$|\$(?![\s$])(?:[^$\\\n]|\\.)*?(?<!\s)\$(?!\w)"
    r"|\\\((?:.|\n){1,1000}?\\\)|\\\[(?:.|\n){1,1000}?\\\]"
)
_CLOSERS = {"$$": "$$", "\\[": "\\]"}


class Code(NamedTuple):
    """The content of a fence."""

    language: str
    text: str


class Unit(NamedTuple):
    """A top-level block, or one item of a top-level list.

    `gap` says whether an empty line comes before it, `number` is an item's number in an ordered list.
    """

    node: "Node"
    gap: bool
    number: int | None


class Lead(NamedTuple):
    """What the text before a source implies for its first unit.

    `table` is the beginning of a table that goes on: its header and the rows that decide its columns' widths.
    """

    gap: bool = False
    number: int | None = None
    table: str = ""


NO_LEAD = Lead()


def parse(source: str) -> "Node":
    """Return the tree of blocks; their inline text is not parsed yet."""
    from markdown_it.tree import SyntaxTreeNode

    return SyntaxTreeNode(_blocks(source))


def parse_inline(text: str) -> "Node":
    """Parse the inline text of one block."""
    from markdown_it.tree import SyntaxTreeNode

    return SyntaxTreeNode(_parser().parseInline(text))


def _blocks(source: str) -> list["Token"]:
    parser = _parser()
    tokens: list[Token] = []
    parser.block.parse(source, parser, {}, tokens)
    return tokens


def units(root: "Node", lead: Lead) -> list[Unit]:
    """Return the top-level blocks in order, with lists split into their items."""
    found: list[Unit] = []
    before: Node | None = None
    for node in root.children:
        gap = lead.gap if before is None else gap_between(before, node)
        if node.type in LISTS:
            found += _items(node, gap, lead.number if before is None else None)
        else:
            found.append(Unit(node, gap, None))
        before = node
    return found


def _items(node: "Node", gap: bool, number: int | None) -> Iterator[Unit]:
    if node.type == "ordered_list" and number is None:
        number = int(node.attrs.get("start", 1))
    for place, item in enumerate(node.children):
        if place:
            gap = first_line(item) > last_line(node.children[place - 1])
        yield Unit(item, gap, number + place if number is not None else None)


def gap_between(before: "Node", node: "Node") -> bool:
    """Tell whether an empty line separates two top-level blocks."""
    if before.type == "heading":
        return False
    introduced = before.type == "paragraph" and node.type in LISTS
    return not introduced or first_line(node) > last_line(before)


def first_line(node: "Node") -> int:
    return node.map[0] if node.map else 0


def last_line(node: "Node") -> int:
    """Return the line after the block's last line that is not empty."""
    if node.type in (*LISTS, "list_item", "blockquote"):
        return last_line(node.children[-1]) if node.children else first_line(node) + 1
    return node.map[1] if node.map else 0


def is_open_fence(node: "Node", lines: list[str]) -> bool:
    """Tell whether a top-level fence is still open after `lines`."""
    first, last = node.map or (0, 0)
    return node.type == "fence" and (last - first < 2 or not closes(node.markup, lines[last - 1]))


def closes(markup: str, line: str) -> bool:
    """Tell whether `line` closes a top-level fence that `markup` opened."""
    text = line.rstrip(" \t")
    indent = len(text) - len(text.lstrip(" "))
    marks = text[indent:]
    return indent < 4 and len(marks) >= len(markup) and not marks.strip(markup[0])


def language_of(info: str) -> str:
    """Return the language that a fence's first line names."""
    words = info.replace("{", " ").replace("}", " ").replace(",", " ").split()
    return words[0].lstrip(".").lower() if words else ""


def code_blocks(source: str) -> list[Code]:
    """Return all fences in the order of the text, nested ones too."""
    return [
        Code(language_of(token.info), token.content) for token in _blocks(source) if token.type == "fence"
    ]


@cache
def _parser() -> "MarkdownIt":
    from markdown_it import MarkdownIt  # a twentieth of a second, spent when there is something to show

    from .emphasis import InlineParser

    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": _MAX_NESTING})
    active = parser.get_active_rules()
    parser.inline = InlineParser()
    parser.inline.ruler.enableOnly(active["inline"])
    parser.inline.ruler2.enableOnly(active["inline2"])
    parser.enable(["table", "strikethrough"]).disable(["reference", "html_block", "html_inline"])
    parser.inline.ruler.before("escape", "math", _inline_math)
    parser.block.ruler.before(
        "fence", "math", _block_math, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    return parser


def _inline_math(state: "StateInline", silent: bool) -> bool:
    if state.src[state.pos] not in "$\\":
        return False
    match = _MATH.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not silent:
        state.push("math_inline", "math", 0).content = match.group()
    state.pos = match.end()
    return True


def _block_math(state: "StateBlock", start: int, end: int, silent: bool) -> bool:
    """Parse a block of mathematics: from `$$` or `\\[` to the line that closes it, or to an empty line."""
    if state.is_code_block(start):
        return False
    first = _line(state, start)
    closer = _CLOSERS.get(first[:2])
    if closer is None or (closer in first[2:] and not _closed(first[2:], closer)):
        return False
    if silent:
        return True
    stop = start + 1
    if not _closed(first[2:], closer):
        stop = _end_of_math(state, stop, end, closer)
    token = state.push("math_block", "math", 0)
    token.content = state.getLines(start, stop, state.blkIndent, False)
    token.map = [start, stop]
    state.line = stop
    return True


def _end_of_math(state: "StateBlock", line: int, end: int, closer: str) -> int:
    while line < end and not state.isEmpty(line) and state.sCount[line] >= state.blkIndent:
        line += 1
        if _closed(_line(state, line - 1), closer):
            break
    return line


def _line(state: "StateBlock", number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]


def _closed(text: str, closer: str) -> bool:
    return text.rstrip(" .,;").endswith(closer)
