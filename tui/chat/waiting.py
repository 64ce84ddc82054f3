"""Messages and commands given while the chat is busy; each is done when everything before it has ended."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class WaitingLine:
    """A line as it was given, and what it asks for. A message needs a model; a command says what it lacks."""

    text: str
    work: Callable[[], Awaitable[None]]
    is_message: bool


class WaitingLines:
    """The lines of one chat that wait, the next one first."""

    def __init__(self) -> None:
        self._lines: list[WaitingLine] = []

    def __bool__(self) -> bool:
        return bool(self._lines)

    @property
    def texts(self) -> list[str]:
        return [line.text for line in self._lines]

    def add(self, line: WaitingLine, *, first: bool = False) -> None:
        self._lines.insert(0 if first else len(self._lines), line)

    def next(self, *, has_model: bool) -> WaitingLine | None:
        """Remove the next line and return it; None if there is none that can be done."""
        if not self._lines or (self._lines[0].is_message and not has_model):
            return None
        return self._lines.pop(0)

    def take_back(self) -> str | None:
        """Remove the line that was given last and return its text; None if there is none."""
        return self._lines.pop().text if self._lines else None

    def clear(self) -> None:
        self._lines.clear()
