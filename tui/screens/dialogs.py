"""Small questions above the chat: yes or no, or one of a list."""

from typing import ClassVar

from textual import events
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
    """A choice; dismissed with the value of the chosen option, or None. Letters filter the options."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,ctrl+c", "dismiss(None)", "close")]

    def __init__(self, title: str, options: list[tuple[str, str]]):
        super().__init__()
        self._title, self._choices = title, options
        self._filter = ""

    def compose(self) -> ComposeResult:
        keys = (("enter", "choose"), ("letters", "filter"), ("esc", "leave"))
        with Vertical(classes="dialog"):
            yield Static(Content(printable(self._title)), id="choose-title")
            yield Choices(*self._rows(), compact=True)
            yield Static(hint_line(keys), classes="dialog-keys")

    @property
    def _matching(self) -> list[tuple[str, str]]:
        """The options that have every word of the filter."""
        words = self._filter.casefold().split()
        return [option for option in self._choices if all(word in option[1].casefold() for word in words)]

    def _rows(self) -> list[Option]:
        return [Option(Content(printable(label))) for _, label in self._matching]

    def on_key(self, event: events.Key) -> None:
        """Filter by what is typed; a letter that nothing would match is not taken."""
        before = self._filter
        if event.key == "backspace":
            self._filter = before[:-1]
        elif event.is_printable and event.character:
            self._filter = (before + event.character).lstrip()
        if self._filter == before:
            return
        event.stop()
        if not self._matching:
            self._filter = before
            self.app.bell()
            return
        choices = self.query_one(Choices)
        choices.clear_options().add_options(self._rows())
        choices.highlighted = 0
        shown = f"{self._title}  {self._filter}" if self._filter else self._title
        self.query_one("#choose-title", Static).update(Content(printable(shown)))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._matching[event.option_index][0])
