"""What a front end shows of a session, as plain JSON values: its turns and branches, what was read and kept.

Numbers that come from a store may have been imported: of unknown or wrong ones nothing is passed on.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

from ..events import Done, FinishReason, Performance
from ..storage.records import title_of
from .transcript import Input, Node, Output, branch, calls_of

if TYPE_CHECKING:
    from .session import Session

COUNTS = [field.name for field in fields(Done) if field.name.endswith("_tokens")]
SPEEDS = [field.name for field in fields(Performance)]


def state_of(session: "Session") -> dict[str, Any]:
    """The conversation: its current branch as turns from 1, and the ends of all branches.

    `tokens` is what the branch takes of `context_limit`; times are in seconds, `created` since 1970. A turn's
    `siblings` are the replies to the same question and to its other forms, its own among them.
    """
    nodes = branch(session.leaf)
    outputs = [node for node in nodes if isinstance(node, Output)]
    siblings = _siblings(session.nodes)
    return {
        "conversation": session.conversation,
        "title": session.title,
        "system": session.system,
        "history": session.history,
        "tokens": len(session.author.ids(nodes, session.history)),
        "context_limit": session.context_limit,
        "leaf": session.leaf.number if session.leaf else None,
        "turns": [_turn(number, node, siblings) for number, node in enumerate(outputs, 1)],
        "branches": [_branch(end, end is session.leaf) for end in session.branches()],
    }


def _siblings(nodes: Sequence[Node]) -> dict[int | None, list[int]]:
    """The replies that follow the same reply, by its number."""
    found: dict[int | None, list[int]] = {}
    for node in nodes:
        if isinstance(node, Output):
            found.setdefault(_before(node), []).append(node.number)
    return found


def _before(node: Output) -> int | None:
    return node.parent.parent.number if node.parent.parent else None


def _turn(number: int, node: Output, siblings: dict[int | None, list[int]]) -> dict[str, Any]:
    stats = _stats(node.stats)
    reason = node.stats.get("finish_reason")
    return {
        "number": number,
        "role": "user" if node.parent.asks else "tool",
        "question": node.parent.text,
        "thinking": node.message.get("reasoning_content", ""),
        "answer": node.message["content"],
        "tool_calls": calls_of(node.message),
        "finish_reason": reason if reason in get_args(FinishReason) else "cancelled",
        "node": node.number,
        "siblings": siblings[_before(node)],
        "stats": stats,
        "seconds_thinking": stats["performance"]["seconds_thinking"],
        "created": node.created,
    }


def _stats(stored: dict[str, Any]) -> dict[str, Any]:
    performance = stored.get("performance")
    measured = performance if isinstance(performance, dict) else {}
    return {
        **{name: int(_number(stored.get(name))) for name in COUNTS},
        "performance": {name: _number(measured.get(name)) for name in SPEEDS},
    }


def _number(value: Any) -> int | float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else 0


def _branch(end: Output, current: bool) -> dict[str, Any]:
    return {"number": end.number, "first_words": title_of(end.parent.text), "current": current}


def explain(session: "Session") -> dict[str, Any]:
    """What was reused and read again per turn and why, and every snapshot with its bytes."""
    return {
        "history": session.history,
        "turns": [
            {
                "turn": turn.number,
                "how": turn.sync.how,
                "why": turn.sync.why,
                "prompt_tokens": turn.prompt_tokens,
                "cached_tokens": turn.sync.cached,
                "prefilled_tokens": turn.prefilled_tokens,
            }
            for turn in session.turns
        ],
        "snapshots": [
            {"turn": s.turn, "kind": s.kind, "tokens": s.length, "state_nbytes": s.cache.state_nbytes}
            for s in session.snapshots
        ],
        "snapshot_nbytes": session.snapshots.nbytes,
        "snapshot_budget_nbytes": session.snapshots.budget_nbytes,
    }


def first_question(nodes: Sequence[Node]) -> str:
    """What the conversation began with, empty where it did not."""
    return next((node.text for node in nodes if isinstance(node, Input)), "")
