"""The bottom row: at most six keys that make sense now, or a sentence about what just happened."""

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.timer import Timer

from ..text.output import printable
from .hints import GAP
from .line import Line, Piece, piece

MOST_KEYS = 6
NARROW = 70
SAY_SECONDS = 4.0


class Keybar(Line):
    """Shows keys with their labels; `say` covers them for a few seconds."""

    PREFIX = "keybar"
    GAP = GAP
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "keybar--key",
        "keybar--info",
        "keybar--warning",
        "keybar--error",
    }

    def __init__(self) -> None:
        super().__init__(id="keybar")
        self._keys: tuple[tuple[str, str], ...] = ()
        self._said: tuple[str, str] | None = None
        self._timer: Timer | None = None

    def show(self, keys: Sequence[tuple[str, str]]) -> None:
        """Show these (key, label), the most useful first; a narrow window shows the first and the last."""
        chosen = tuple(keys[:MOST_KEYS])
        if chosen != self._keys:
            self._keys = chosen
            self.refresh()

    def say(self, text: str, kind: str = "info", seconds: float = SAY_SECONDS) -> None:
        self._said = (text, kind)
        if self._timer is not None:
            self._timer.stop()
        self._timer = self.set_timer(seconds, self.hush)
        self.refresh()

    def hush(self) -> None:
        self._said = None
        self.refresh()

    def on_resize(self, event: events.Resize) -> None:
        del event
        self.refresh()

    def left(self) -> list[Piece]:
        if self._said is not None:
            return [piece(printable(self._said[0]), self._said[1])]
        keys = self._keys
        if self.size.width < NARROW and len(keys) > 2:
            keys = (keys[0], keys[-1])
        last = len(keys) - 1
        return [
            Piece((("key", key), ("", f" {label}")), 0 if place == last else place + 1)
            for place, (key, label) in enumerate(keys)
        ]
