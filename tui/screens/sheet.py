"""A screen of text to read: reports drawn to its width, scrolled by the usual keys."""

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from ..text.report import Report
from ..widgets.hints import hint_line
from .listing import CSS, drawn


class Sheet(ModalScreen[str | None]):
    """A screen of reports, which subclasses return anew whenever it is drawn."""

    CSS_PATH = CSS
    AUTO_FOCUS = "#sheet-text"
    HEADING: ClassVar[str] = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,ctrl+c,q,enter", "dismiss(None)", "close", priority=True),
        Binding("j", "scroll('down')", show=False),
        Binding("k", "scroll('up')", show=False),
        Binding("space", "scroll('page_down')", show=False),
    ]

    def reports(self) -> Sequence[Report]:
        raise NotImplementedError

    def compose(self) -> ComposeResult:
        with Vertical(classes="sheet"):
            with Horizontal(classes="sheet-head"):
                yield Static(Content.styled(self.HEADING, "bold"), id="sheet-title")
            with VerticalScroll(id="sheet-text"):
                yield Static(id="sheet-report")
            yield Static(hint_line((("↑↓ pgup pgdn", "scroll"), ("esc", "close"))), id="sheet-keys")

    def on_resize(self, _: events.Resize) -> None:
        self.draw()

    def draw(self) -> None:
        """Draw the reports as they are now."""
        width = max(20, self.size.width - 4)
        content = Content("\n\n").join([drawn(report, width) for report in self.reports()])
        for text in self.query("#sheet-report").results(Static):  # none while the screen is being closed
            text.update(content)

    def action_scroll(self, way: str) -> None:
        getattr(self.query_one("#sheet-text"), f"scroll_{way}")(animate=False)
