"""The text inside a block as spans: emphasis, code, mathematics, links with visible addresses."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from .lines import Span, styled
from .maths import as_unicode
from .parser import parse_inline

if TYPE_CHECKING:
    from markdown_it.tree import SyntaxTreeNode as Node

_STYLES = {"strong": "strong", "em": "em", "s": "struck"}
_BREAK = re.compile(r"<br ?/?>")
# an address that can be handed to a terminal: nothing in it could end the sequence that it travels in
_SAFE_ADDRESS = re.compile(r"https?://[!-~]{1,2000}\Z")


def inline(node: "Node") -> list[Span]:
    """Return the spans of a block's text; lines end with `\\n` where the source's do."""
    return [span for child in node.children for span in _parsed(child.content)]


@lru_cache(1024)
def _parsed(text: str) -> tuple[Span, ...]:
    """Parse inline text; cached, because an open table or list is laid out often with few changes."""
    return tuple(
        span for child in parse_inline(text).children for part in child.children for span in _spans(part)
    )


def _spans(node: "Node") -> Iterable[Span]:
    match node.type:
        case "text":
            return [Span(_BREAK.sub("\n", node.content))] if node.content else []
        case "softbreak" | "hardbreak":
            return [Span("\n")]
        case "code_inline":
            return [Span(node.content, "code")]
        case "math_inline":
            text = as_unicode(node.content).replace("\n", " ")
            return [Span(text, "math", None if text == node.content else node.content)]
        case "link":
            return _link(node)
        case "image":
            return [Span(node.content or "image", "em"), *_address(str(node.attrs.get("src", "")))]
    inner = [span for child in node.children for span in _spans(child)]
    return styled(inner, _STYLES[node.type]) if node.type in _STYLES else inner


def _link(node: "Node") -> list[Span]:
    """Return the text and the address of a link, once if they are equal."""
    inner = [span for child in node.children for span in _spans(child)]
    address = str(node.attrs.get("href", ""))
    text = "".join(span.text for span in inner)
    if text == address.removeprefix("mailto:"):
        return [Span(text, "address", action=_action(address))]
    return [*styled(inner, "link"), *_address(address)]


def _address(address: str) -> list[Span]:
    return [Span(" ("), Span(address, "address", action=_action(address)), Span(")")] if address else []


def _action(address: str) -> str:
    return f"link {address}" if _SAFE_ADDRESS.match(address) else ""
