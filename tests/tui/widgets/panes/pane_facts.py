"""Facts for the panes: a conversation of some turns, the memory of a machine, a reply on its way."""

from dataclasses import replace
from typing import Any

from qchat.core.conversation.summary import Branch, CacheSummary, ConversationState, TurnStats
from qchat.core.events import Performance
from qchat.core.worker.wire import MemoryResult
from qchat.tui.chat.meter import ReplyFigures, Status
from qchat.tui.chat.turns import NO_STATE, new_turn
from qchat.tui.text.report import Line
from qchat.tui.text.sanitise import cells
from qchat.tui.widgets.panes.facts import Pane, PaneFacts
from tests.tui.widgets.test_status import MODEL

GB = 10**9
NO_CACHE = CacheSummary("preserve", (), (), 0, 0, 0, 0, 0)


def conversation(*sizes: tuple[int, int], branches: tuple[Branch, ...] = ()) -> ConversationState:
    """A conversation with a turn for each (tokens of the question, tokens of the reply)."""
    turns, end = [], 0
    for number, (asked, generated) in enumerate(sizes, 1):
        stats = TurnStats(
            prompt_tokens=end + asked,
            cached_tokens=end,
            prefilled_tokens=asked,
            generated_tokens=generated,
            performance=Performance(decode_tokens_per_s=20.0 + number, seconds_to_first_token=0.5),
        )
        turns.append(replace(new_turn(number, f"question {number}"), node=2 * number, stats=stats))
        end += asked + generated
    leaf = turns[-1].node if turns else None
    here = (Branch(leaf, "question", True, len(turns), len(turns)),) if leaf else ()
    return replace(
        NO_STATE, tokens=end, context_limit=1000, turns=tuple(turns), leaf=leaf, branches=branches or here
    )


def facts_of(status: Status | None = None, **given: Any) -> PaneFacts:
    known = {"state": conversation((100, 100), (20, 80)), "model": MODEL, **given}
    return PaneFacts(status=status or Status(phase="idle", context_limit=1000), **known)


def replying(**given: Any) -> Status:
    """A reply of 200 tokens after 100 read ones, 40 of them reused."""
    reply = ReplyFigures([20.0] * 20, 2.0, 3.0, prompt_tokens=100, cached_tokens=40)
    known = {
        "phase": "answering",
        "seconds": 8.0,
        "tokens_per_s": 20.3,
        "context_tokens": 300,
        "context_limit": 1000,
        "reply": reply,
        **given,
    }
    return Status(**known)


def memory(**given: Any) -> MemoryResult:
    known = {
        "active_nbytes": 12 * GB,
        "cache_nbytes": 2 * GB,
        "peak_nbytes": 16 * GB,
        "limit_nbytes": 20 * GB,
        "copy_bandwidth": None,
        "weights_nbytes": 8 * GB,
        "context_nbytes": 3 * GB,
        "snapshot_nbytes": 1 * GB,
        "snapshot_budget_nbytes": 4 * GB,
    }
    return MemoryResult(**known | given)


def text_of(line: Line) -> str:
    return "".join(text for _, text in line)


def drawn(pane: Pane, facts: PaneFacts, width: int = 40, rows: int = 7) -> list[str]:
    """The pane's lines as text, none of which is wider than allowed."""
    lines = [text_of(line) for line in pane.lines(facts, width, rows)]
    assert len(lines) <= rows
    assert all(cells(line) <= width for line in lines), lines
    return lines
