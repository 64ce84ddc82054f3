"""The row above the prompt that shows queued messages and commands."""

from collections.abc import Sequence
from typing import ClassVar

from ..text.output import printable
from .line import Line, Piece, piece


class Queued(Line):
    """Shows the newest queued message or command; hidden while there is none."""

    PREFIX = "queued"
    COMPONENT_CLASSES: ClassVar[set[str]] = {"queued--count", "queued--text"}

    def __init__(self) -> None:
        super().__init__(id="queued")
        self.display = False
        self._waiting: tuple[str, ...] = ()

    def show(self, waiting: Sequence[str]) -> None:
        if tuple(waiting) != self._waiting:
            self._waiting = tuple(waiting)
            self.display = bool(self._waiting)
            self.refresh()

    def left(self) -> list[Piece]:
        if not self._waiting:
            return []
        count = f"queued {len(self._waiting)} · ↑ edit"
        return [piece(count, "count"), piece(printable(" ".join(self._waiting[-1].split()))[:200], "text")]
