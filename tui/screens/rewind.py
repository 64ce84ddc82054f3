"""The questions of this conversation, to go back to one: edit it, or go on from its answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.binding import Binding, BindingType

from ...core.conversation.summary import SOON, CacheSummary, SnapshotSummary, Turn
from ...core.errors import QchatError
from ..commands.base import turns
from .listing import Column, Keys, Listing, Row

if TYPE_CHECKING:
    from ..chat.controller import Chat
    from ..commands import Front


class RewindScreen(Listing):
    """The questions of this branch; dismissed with "/edit N" or "/fork N"."""

    HEADING = "Rewind · the questions of this conversation"
    EMPTY = "No question yet: ask one, then come back to change it."
    COLUMNS = (
        Column("", 4, "right"),
        Column("question"),
        Column("answer", 9, "right", rank=2),
        Column("returning there", 22, rank=1),
    )
    KEYS: ClassVar[Keys] = (
        ("enter", "edit the question"),
        ("f", "go on from its answer"),
        ("/", "filter"),
        ("esc", "close"),
    )
    BINDINGS: ClassVar[list[BindingType]] = [Binding("f", "fork", show=False)]

    def __init__(self, chat: "Chat"):
        super().__init__()
        self._chat = chat

    def on_mount(self) -> None:
        super().on_mount()
        self.show_rows(rows_of(turns(self._chat), ()))
        self.options.highlighted = len(self.rows) - 1 if self.rows else None
        self.ask_engine()

    @work
    async def ask_engine(self) -> None:
        """Ask which snapshots are kept, unless the engine is busy."""
        if self._chat.busy or self._chat.model is None:
            return
        try:
            cache: CacheSummary = await self._chat.request("explain")
        except QchatError:
            return
        if self.is_open:
            self.show_rows(rows_of(turns(self._chat), cache.snapshots))

    def chosen(self, row: Row) -> None:
        self.dismiss(f"/edit {row.id}")

    def action_fork(self) -> None:
        if self.current is not None:
            self.dismiss(f"/fork {self.current.id}")


def rows_of(turns: Sequence[Turn], snapshots: Sequence[SnapshotSummary]) -> list[Row]:
    """Return a row for each question, with what editing it would read again, given the snapshots."""
    rows, begin = [], 0
    for turn in turns:
        kept = max((one.tokens for one in snapshots if one.tokens <= begin), default=0)
        cost = "instant" if begin - kept <= SOON else f"re-reads {shown(begin - kept)} tokens"
        generated = turn.stats.generated_tokens
        if turn.role == "user":
            rows.append(Row(str(turn.number), (f"#{turn.number}", turn.question, shown(generated), cost)))
        begin = turn.stats.prompt_tokens + generated
    return rows


def shown(tokens: int) -> str:
    return f"{tokens / 1000:.1f}k" if tokens >= 1000 else str(tokens)


def make(chat: "Chat", front: "Front") -> RewindScreen:
    del front
    return RewindScreen(chat)
