"""The requests of the server beside the chat, live."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.errors import UsageError
from ..text.report import Report
from .sheet import Sheet

if TYPE_CHECKING:
    from ..chat.controller import Chat
    from ..chat.view import Companion
    from ..commands import Front

DRAW_SECONDS = 0.5


class ServeScreen(Sheet):
    """The requests under way, and those that ended last."""

    HEADING = "Requests"

    def __init__(self, server: "Companion"):
        super().__init__()
        self._server = server

    def reports(self) -> Sequence[Report]:
        return [self._server.report()]

    def on_mount(self) -> None:
        self.set_interval(DRAW_SECONDS, self.draw)


def make(chat: "Chat", front: "Front") -> ServeScreen:
    """Return the screen. Raises UsageError if nothing is served."""
    del front
    if chat.server is None:
        raise UsageError("nothing is served: /serve begins it")
    return ServeScreen(chat.server)
