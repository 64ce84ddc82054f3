"""The tables of an answer, one at a time, at their full width."""

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from ..commands.base import plural
from ..text.markdown import WholeTable
from ..widgets.hints import hint_line
from ..widgets.table_view import TableView
from .listing import CSS

KEYS = (("←→↑↓", "scroll"), ("esc", "close"))
OTHERS = (("n p", "other tables"),)


class TableScreen(ModalScreen[None]):
    """Shows the table of place `number`, from 0, and the others by keys."""

    CSS_PATH = CSS
    AUTO_FOCUS = "TableView"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,ctrl+c,q,enter", "dismiss(None)", "close", priority=True),
        Binding("n", "go(1)", show=False),
        Binding("p", "go(-1)", show=False),
    ]

    def __init__(self, tables: Sequence[WholeTable], number: int = 0):
        super().__init__()
        self._tables, self.number = tables, min(number, len(tables) - 1)
        self.table = TableView()

    def compose(self) -> ComposeResult:
        with Vertical(classes="sheet"):
            with Horizontal(classes="sheet-head"):
                yield Static(id="sheet-title")
            yield self.table
            yield Static(hint_line(KEYS + OTHERS * (len(self._tables) > 1)), id="sheet-keys")

    def on_mount(self) -> None:
        self.action_go(0)

    def action_go(self, step: int) -> None:
        """Show the table `step` places on, and after the last one the first."""
        self.number = (self.number + step) % len(self._tables)
        table = self._tables[self.number]
        place = f"Table {self.number + 1} of {len(self._tables)}" if len(self._tables) > 1 else "Table"
        title = f"{place} · {plural(table.rows, 'row')} · {plural(table.columns, 'column')}"
        self.query_one("#sheet-title", Static).update(Content.styled(title, "bold"))
        self.table.show(table)
