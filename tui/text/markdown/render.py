"""Blocks as lines for a width. Pure: only the source, the frame and the text before it matter."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..sanitise import cells, cut
from .highlight import highlight
from .inline import inline
from .lines import BLANK, Frame, Line, Span, lay, lay_hard, prefixed, styled, width_of
from .maths import as_unicode
from .parser import (
    LISTS,
    NO_LEAD,
    Lead,
    first_line,
    gap_between,
    is_open_fence,
    language_of,
    last_line,
    parse,
    units,
)
from .splitter import Piece
from .table import table

if TYPE_CHECKING:
    from markdown_it.tree import SyntaxTreeNode as Node

_BULLETS = "•◦▪"
_BOXES = {"[ ] ": "☐ ", "[x] ": "☑ ", "[X] ": "☑ "}
_INDENT = 2  # cells before code
_GOES_ON = "↩ "  # in their place where a line of code goes on


def render(piece: Piece, frame: Frame) -> list[Line]:
    """Return the lines of one piece, with the empty line before it."""
    if piece.fence is None:
        return blocks(piece.source, frame, piece.lead)
    lines = [BLANK] if piece.lead.gap and piece.fence.opening else []
    if piece.fence.opening:
        lines.append(fence_top(piece.fence.info, frame))
    if piece.source:
        lines += code_rows(piece.source, piece.fence.info, frame, closed=False)
    return lines if piece.fence.whole is None else [*lines, fence_bottom(frame)]


def blocks(source: str, frame: Frame, lead: Lead = NO_LEAD) -> list[Line]:
    """Return the lines of `source`, which begins a text or continues one as `lead` says."""
    lines: list[Line] = []
    root = parse(source)
    rows = source.split("\n")
    for node, gap, number in units(root, lead):
        if gap:
            lines.append(BLANK)
        if node.type == "list_item":
            lines += _item(node, number, frame, 0)
        elif node.type == "table":
            begun, lead = lead.table, NO_LEAD
            lines += table(node, frame, begun)
        elif node.type == "fence":
            lines += fence(node.content, node.info, frame, closed=not is_open_fence(node, rows))
        else:
            lines += _block(node, frame, 0)
    return lines


def _block(node: "Node", frame: Frame, depth: int) -> list[Line]:
    special = _SPECIAL.get(node.type)
    if special is not None:
        return special(node, frame)
    if node.type in LISTS:
        return _list(node, frame, depth)
    if node.type == "blockquote":
        bar = Span("▎ ", "quote", "> ")
        inner = _children(node.children, frame.less(2), depth)
        return prefixed([Line(tuple(styled(line.spans, "quoted")), line.joint) for line in inner], bar, bar)
    return lay(inline(node), frame.width)


def _children(nodes: Sequence["Node"], frame: Frame, depth: int) -> list[Line]:
    """Render nested blocks, separated by an empty line where the source has one."""
    lines: list[Line] = []
    for place, node in enumerate(nodes):
        if place and first_line(node) > last_line(nodes[place - 1]) and gap_between(nodes[place - 1], node):
            lines.append(BLANK)
        lines += _block(node, frame, depth)
    return lines


def _list(node: "Node", frame: Frame, depth: int) -> list[Line]:
    lines: list[Line] = []
    start = int(node.attrs.get("start", 1)) if node.type == "ordered_list" else None
    for place, item in enumerate(node.children):
        if place and first_line(item) > last_line(node.children[place - 1]):
            lines.append(BLANK)
        lines += _item(item, start + place if start is not None else None, frame, depth)
    return lines


def _item(node: "Node", number: int | None, frame: Frame, depth: int) -> list[Line]:
    if number is None:
        mark = Span(f"{_BULLETS[min(depth, len(_BULLETS) - 1)]} ", "bullet", "- ")
    else:
        mark = Span(f"{number}. ", "bullet")
    under = Span(" " * cells(mark.text))
    lines = _children(node.children, frame.less(cells(mark.text)), depth + 1)
    box = lines[0].spans[0].text[:4] if lines and lines[0].spans else ""
    if number is None and box in _BOXES:
        mark = Span(_BOXES[box], "bullet", f"- {box}")
        lines[0] = Line(_without_start(lines[0].spans, len(box)))
    return prefixed(lines, mark, under)


def _without_start(spans: tuple[Span, ...], count: int) -> tuple[Span, ...]:
    first, *rest = spans
    text = first.text[count:]
    return (first._replace(text=text), *rest) if text else tuple(rest)


def _heading(node: "Node", frame: Frame) -> list[Line]:
    return lay(styled(inline(node), f"h{node.tag[1]}"), frame.width)


def _rule(_: "Node", frame: Frame) -> list[Line]:
    return [Line((Span("─" * frame.width, "rule", "---"),))]


def _math(node: "Node", frame: Frame) -> list[Line]:
    source = node.content.rstrip("\n")
    text = as_unicode(source)
    return lay_hard([Span(text, "math", None if text == source else source)], frame.wide)


def _nested_fence(node: "Node", frame: Frame) -> list[Line]:
    return fence(node.content, node.info, frame, closed=True)


def _indented_code(node: "Node", frame: Frame) -> list[Line]:
    return code_rows(node.content, "", frame, closed=False)


_SPECIAL: dict[str, Callable[["Node", Frame], list[Line]]] = {
    "heading": _heading,
    "hr": _rule,
    "math_block": _math,
    "fence": _nested_fence,
    "code_block": _indented_code,
    "table": table,
}


def fence(code: str, info: str, frame: Frame, *, closed: bool) -> list[Line]:
    """Render code between two rules; the lower one is missing while the fence is open."""
    rows = [fence_top(info, frame)]
    if code:
        rows += code_rows(code, info, frame, closed=closed)
    return [*rows, fence_bottom(frame)] if closed else rows


def fence_top(info: str, frame: Frame) -> Line:
    """Return the upper rule, with the language and the word that copies the code."""
    name = cut(" ".join(info.split()), frame.width // 2)
    left = f"┌ {name} " if name else "┌"
    rest = frame.width - cells(left) - cells(" copy ─┐")
    spans = [Span(left + "─" * rest, "rule", f"```{info}"), Span(" copy ", "copy", "", "copy")]
    return Line((*spans, Span("─┐", "rule", "")))


def fence_bottom(frame: Frame) -> Line:
    return Line((Span("└" + "─" * (frame.width - 2) + "┘", "rule", "```"),))


def code_rows(code: str, info: str, frame: Frame, *, closed: bool) -> list[Line]:
    """Return highlighted code on a background as wide as the rules or as its longest line.

    What is too long for the window goes on in another row, with a mark that is not copied.
    """
    room = frame.wide - _INDENT
    indent, more = Span(" " * _INDENT, "ground", ""), Span(_GOES_ON, "ground rule", "")
    rows = []
    for source in highlight(code, language_of(info), closed):
        for place, line in enumerate(lay_hard(styled(source, "ground"), room)):
            free = max(frame.width - _INDENT - width_of(line.spans), 0)
            pad = (Span(" " * free, "ground", ""),) if free else ()
            rows.append(Line((more if place else indent, *line.spans, *pad), line.joint))
    return rows
