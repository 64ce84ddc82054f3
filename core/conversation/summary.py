"""A session as plain JSON values for front ends: turns and branches, prefixes reused, snapshots kept.

Looks at a session from above. Imported conversations may hold anything in their statistics: unknown names and
values that are not numbers are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from ..events import Done, FinishReason, Performance
from ..generation.draft_gate import MAX_DRAFTS
from ..storage.records import make_title
from .session import Session
from .transcript import Node, Output, tool_calls_of

COUNTS = [field.name for field in fields(Done) if field.name.endswith("_tokens")]
BY_PLACE = "drafts_by_place"
SPEEDS = [field.name for field in fields(Performance) if field.name != BY_PLACE]


def describe_session(session: Session) -> dict[str, Any]:
    """Describe the conversation: its current branch as turns from 1, and the ends of all branches.

    `tokens` is the branch's share of `context_limit`; times are in seconds, `created` since 1970. A turn's
    `siblings` are the replies to the same question and to its edits, itself included.
    """
    tree = session.tree
    nodes = tree.branch()
    outputs = [node for node in nodes if isinstance(node, Output)]
    siblings = _siblings(tree.nodes)
    return {
        "conversation": session.conversation,
        "title": session.title,
        "system": session.system,
        "history": session.history,
        "tokens": len(session.prompt_ids()),
        "context_limit": session.context_limit,
        "leaf": tree.leaf.number if tree.leaf else None,
        "turns": [_turn(number, node, siblings) for number, node in enumerate(outputs, 1)],
        "branches": [_branch(end, end is tree.leaf) for end in tree.branch_ends()],
    }


def _siblings(nodes: Sequence[Node]) -> dict[int | None, list[int]]:
    """Group the numbers of replies by the number of the reply they follow."""
    found: dict[int | None, list[int]] = {}
    for node in nodes:
        if isinstance(node, Output):
            found.setdefault(_previous_reply(node), []).append(node.number)
    return found


def _previous_reply(node: Output) -> int | None:
    return node.parent.parent.number if node.parent.parent else None


def _turn(number: int, node: Output, siblings: dict[int | None, list[int]]) -> dict[str, Any]:
    stats = _stats(node.stats)
    reason = node.stats.get("finish_reason")
    return {
        "number": number,
        "role": "user" if node.parent.is_question else "tool",
        "question": node.parent.text,
        "thinking": node.message.get("reasoning_content", ""),
        "answer": node.message["content"],
        "tool_calls": tool_calls_of(node.message),
        "finish_reason": reason if reason in get_args(FinishReason) else "cancelled",
        "node": node.number,
        "siblings": siblings[_previous_reply(node)],
        "stats": stats,
        "seconds_thinking": stats["performance"]["seconds_thinking"],
        "created": node.created,
    }


def _stats(stored: dict[str, Any]) -> dict[str, Any]:
    performance = stored.get("performance")
    measured = performance if isinstance(performance, dict) else {}
    return {
        **{name: int(_number(stored.get(name))) for name in COUNTS},
        "performance": {
            **{name: _number(measured.get(name)) for name in SPEEDS},
            BY_PLACE: _numbers(measured.get(BY_PLACE)),
        },
    }


def _numbers(values: Any) -> list[int | float]:
    return [_number(value) for value in values[:MAX_DRAFTS]] if isinstance(values, list | tuple) else []


def _number(value: Any) -> int | float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else 0


def _branch(end: Output, current: bool) -> dict[str, Any]:
    return {"number": end.number, "first_words": make_title(end.parent.text), "current": current}


def describe_cache(session: Session) -> dict[str, Any]:
    """Describe the prompt cache: what each turn reused and read, and every snapshot with its bytes."""
    snapshots = session.live.snapshots
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
            for s in snapshots
        ],
        "snapshot_nbytes": snapshots.nbytes,
        "snapshot_budget_nbytes": snapshots.budget_nbytes,
    }
