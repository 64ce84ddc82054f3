"""Small questions above the chat: yes or no, or one of a list."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from ..text.output import printable
from ..widgets.choices import Choices
from ..widgets.hints import hint_line


class Confirm(ModalScreen[bool]):
    """A yes-or-no question; dismissed with True for yes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "dismiss(True)", "yes"),
        Binding("n,escape,ctrl+c", "dismiss(False)", "no"),
    ]

    def __init__(self, question: str):
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content(printable(self._question)))
            yield Static(hint_line((("y", "yes"), ("n", "no"))), classes="dialog-keys")


class Choose(ModalScreen[str | None]):
    """A choice; dismissed with the value of the chosen option, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,ctrl+c", "dismiss(None)", "close")]

    def __init__(self, title: str, options: list[tuple[str, str]]):
        super().__init__()
        self._title, self._choices = title, options

    def compose(self) -> ComposeResult:
        rows = [Option(Content(printable(label))) for _, label in self._choices]
        with Vertical(classes="dialog"):
            yield Static(Content(printable(self._title)))
            yield Choices(*rows, compact=True)
            yield Static(hint_line((("enter", "choose"), ("esc", "leave"))), classes="dialog-keys")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._choices[event.option_index][0])
