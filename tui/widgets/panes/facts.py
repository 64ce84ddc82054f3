"""What the panes show of a chat, and what a pane is: pure functions from these facts to lines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...chat.meter import Status
from ...text.report import Line

if TYPE_CHECKING:
    from ....core.conversation.summary import CacheSummary, ConversationState, Turn
    from ....core.worker.wire import MemoryResult, ModelInfo

REPLYING = ("reading", "thinking", "answering")


@dataclass(frozen=True)
class PaneFacts:
    """The figures of a chat at one moment.

    `thought` is the end of the running thought. `memory` and `cache` are as the engine described them when it
    was last idle, None before that. `chosen` is the branch under the cursor, by the number of its last reply.
    """

    status: Status
    state: "ConversationState"
    model: "ModelInfo | None" = None
    thought: str = ""
    budget: int | None = None
    memory: "MemoryResult | None" = None
    cache: "CacheSummary | None" = None
    chosen: int | None = None

    @property
    def replying(self) -> bool:
        return self.status.phase in REPLYING

    @property
    def last(self) -> "Turn | None":
        """The last turn of the current branch."""
        return self.state.turns[-1] if self.state.turns else None


@dataclass(frozen=True)
class Pane:
    """One pane: its rows between `least` and `wanted`, its lines, and what the strip shows of it.

    `note` stands at the right end of the title. `lines` takes width and rows, and may return fewer rows;
    `brief` takes the cells that it may use.
    """

    name: str
    least: int
    wanted: Callable[[PaneFacts], int]
    note: Callable[[PaneFacts], Line]
    lines: Callable[[PaneFacts, int, int], list[Line]]
    brief: Callable[[PaneFacts, int], Line]
