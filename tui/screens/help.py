"""Every key as it is set now, and every command, from the tables that the app itself uses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..commands import help_report
from ..text.report import Report, Table
from ..user.keymap import ACTIONS, Keymap, Scope
from .sheet import Sheet

if TYPE_CHECKING:
    from ..chat.controller import Chat
    from ..commands import Front

SCOPES: tuple[tuple[Scope, str], ...] = (
    ("chat", "Keys everywhere"),
    ("prompt", "Keys in the prompt"),
    ("transcript", "Keys in the conversation (shift+tab goes there)"),
)


class HelpScreen(Sheet):
    HEADING = "Help"

    def __init__(self, keymap: Keymap):
        super().__init__()
        self._keymap = keymap

    def reports(self) -> Sequence[Report]:
        keys = [Report(title, (Table(("", ""), self._keymap.rows(scope)),)) for scope, title in SCOPES]
        shown = {action.id: self._keymap.shown(action.id) for action in ACTIONS}
        ids = Report("Actions, as [keys] in the settings names them", (Table(("", ""), self._keymap.ids()),))
        return [*keys, help_report(shown), ids]


def make(chat: "Chat", front: "Front") -> HelpScreen:
    del chat
    return HelpScreen(getattr(front, "keymap", None) or Keymap())
