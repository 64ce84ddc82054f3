"""The list above the prompt: commands, arguments, files, or earlier prompts, to choose from."""

from collections.abc import Sequence
from dataclasses import dataclass

from textual.content import Content
from textual.widgets.option_list import Option

from ..text.sanitise import cells, cut, fit, printable
from .choices import Choices

MOST_CANDIDATES = 100
COLUMN, WIDEST = 36, 98


@dataclass(frozen=True)
class Candidate:
    """A completion: `text` replaces the line from the index `start` to the cursor.

    `ready` means that enter may send the line then.
    """

    text: str
    shown: str
    help: str = ""
    start: int = 0
    ready: bool = False


class Completion(Choices, can_focus=False):
    """A list that is open while it has candidates; the prompt handles the keys and moves the highlight."""

    def __init__(self) -> None:
        super().__init__(id="completion", compact=True)
        self.display = False
        self.candidates: tuple[Candidate, ...] = ()
        self.moved = False

    @property
    def open(self) -> bool:
        return bool(self.candidates)

    @property
    def chosen(self) -> Candidate | None:
        return self.candidates[self.highlighted or 0] if self.candidates else None

    def show(self, candidates: Sequence[Candidate]) -> None:
        """Open with the first of `candidates` chosen, or close if there are none."""
        chosen = tuple(candidates[:MOST_CANDIDATES])
        self.moved = False
        if chosen != self.candidates:
            self.candidates = chosen
            self.clear_options()
            self.add_options(self._drawn())
            self.display = bool(chosen)
        if chosen:
            self.highlighted = 0

    def close(self) -> None:
        self.show(())

    def move(self, step: int) -> None:
        if self.candidates:
            self.moved = True
            self.highlighted = ((self.highlighted or 0) + step) % len(self.candidates)

    def _drawn(self) -> list[Option]:
        column = min(COLUMN, max((cells(candidate.shown) for candidate in self.candidates), default=0))
        width = min(WIDEST, self.app.size.width - 6)
        return [Option(_row(candidate, column, width)) for candidate in self.candidates]


def _row(candidate: Candidate, column: int, width: int) -> Content:
    """Return a candidate in `width` cells, of which its text takes `column` if help follows."""
    shown = printable(candidate.shown.replace("\n", "⏎"))
    if not candidate.help:
        return Content(cut(shown, width))
    help_ = cut(printable(candidate.help), max(1, width - column - 2))
    return Content.assemble(fit(shown, column), ("  " + help_, "$text-muted"))
