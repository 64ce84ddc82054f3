"""What each turn cost and how fast it was: a table, and the speeds as a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..commands.stats import stats_report
from ..text.report import Report
from .sheet import Sheet

if TYPE_CHECKING:
    from ..chat.controller import Chat
    from ..commands import Front


class StatsScreen(Sheet):
    """The statistics of every turn."""

    HEADING = "Statistics"

    def __init__(self, chat: "Chat"):
        super().__init__()
        self._chat = chat

    def reports(self) -> Sequence[Report]:
        return [stats_report(self._chat)]


def make(chat: "Chat", front: "Front") -> StatsScreen:
    del front
    return StatsScreen(chat)
