"""The row for a text to find in the conversation."""

from dataclasses import dataclass
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input

OPEN_SECONDS = 24 * 3600.0  # how long the row may stay open


class FindBar(Input):
    """Posts Sought for each change of the text, and Stepped to go to another match."""

    @dataclass
    class Sought(Message):
        text: str

    @dataclass
    class Stepped(Message):
        """Go to another match: `step` is 1 towards the end, -1 towards the beginning."""

        step: int

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,up", "step(-1)", "the one before", show=False),
        Binding("down", "step(1)", "the next one", show=False),
    ]

    def __init__(self) -> None:
        super().__init__(id="find", compact=True, placeholder="find in the conversation")
        self.cursor_blink = False
        self.display = False

    def open(self, text: str = "") -> None:
        self.display = True
        self.value = text or self.value
        self.focus()

    def close(self) -> None:
        self.display = False

    def describe(self, place: int, count: int, close: str) -> str:
        """Return which match of `count` is shown (0: none yet) and the keys, of which `close` is one."""
        keys = f"enter before · ↓ next · {close} close"
        which = f"{place:,} of {count:,}" if place else f"{count:,} found"
        return f"{which} · {keys}" if self.value else keys

    def action_step(self, step: int) -> None:
        self.post_message(self.Stepped(step))

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(self.Sought(event.value))
