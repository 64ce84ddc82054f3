"""What a branch told the chat template before its first message: the tools and the effort.

The template states both once, so the first input of a branch decides.
"""

from collections.abc import Sequence
from typing import Any

from .transcript import Input, Node


def branch_tools(nodes: Sequence[Node]) -> list[dict[str, Any]] | None:
    """Return the tools that the model reads on a branch; None for an empty branch."""
    first = nodes[0] if nodes else None
    return list(first.switches.get("tools") or ()) if isinstance(first, Input) else None


def ignored_effort(nodes: Sequence[Node], before: Input | None, word: str | None) -> list[str]:
    """Return a sentence if the effort `word` comes too late for a branch, and `before` did not have it."""
    known = [node.switches.get("reasoning_effort") for node in (nodes[0], before) if isinstance(node, Input)]
    if word in (None, *known):
        return []
    only = "this template states the effort before the first message, so only a new conversation takes"
    return [f"{only} the effort {word}"]
