"""A widget of one row, painted from pieces of styled text; it never asks for a new layout.

A piece that does not fit is dropped whole, the least important first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from textual.strip import Strip
from textual.widget import Widget


@dataclass(frozen=True)
class Piece:
    """Text in one or more styles (component classes without the widget's prefix). Rank 0 is dropped last."""

    spans: tuple[tuple[str, str], ...]
    rank: int = 0

    @property
    def width(self) -> int:
        return sum(cell_len(text) for _, text in self.spans)


def piece(text: str, style: str = "", rank: int = 0) -> Piece:
    return Piece(((style, text),), rank)


class Line(Widget):
    """Shows `left()` and, flush right, `right()`; subclasses name their styles in `COMPONENT_CLASSES`."""

    DEFAULT_CSS = "Line { height: 1; width: 1fr; }"
    PREFIX: ClassVar[str] = "line"
    GAP: ClassVar[int] = 2

    def left(self) -> Sequence[Piece]:
        return ()

    def right(self) -> Sequence[Piece]:
        return ()

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        if y or not width:
            return Strip.blank(width, self.rich_style)
        left, right = fit(self.left(), self.right(), width - 2, self.GAP)
        used = sum(part.width for part in (*left, *right)) + self.GAP * max(0, len(left) - 1)
        used += self.GAP * max(0, len(right) - 1)
        segments = [Segment(" ", self.rich_style), *self._paint(left)]
        segments.append(Segment(" " * max(0, width - 2 - used), self.rich_style))
        segments += self._paint(right)
        return Strip(segments).adjust_cell_length(width, self.rich_style)

    def _paint(self, pieces: Sequence[Piece]) -> list[Segment]:
        segments: list[Segment] = []
        for place, part in enumerate(pieces):
            if place:
                segments.append(Segment(" " * self.GAP, self.rich_style))
            segments += [Segment(text, self._style(name)) for name, text in part.spans]
        return segments

    def _style(self, name: str):
        return self.get_component_rich_style(f"{self.PREFIX}--{name}") if name else self.rich_style


def fit(
    left: Sequence[Piece], right: Sequence[Piece], width: int, gap: int
) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces of both sides that fit into `width` cells; the last one left may be cut."""
    chosen = [(part, side) for side, parts in enumerate((left, right)) for part in parts if part.width]

    def needed() -> int:
        return sum(part.width for part, _ in chosen) + gap * max(0, len(chosen) - 1)

    while len(chosen) > 1 and needed() > width:
        worst = max(range(len(chosen)), key=lambda place: (chosen[place][0].rank, place))
        del chosen[worst]
    if len(chosen) == 1 and needed() > width:
        chosen = [(_cut(chosen[0][0], width), chosen[0][1])]
    return [part for part, side in chosen if not side], [part for part, side in chosen if side]


def _cut(part: Piece, width: int) -> Piece:
    spans: list[tuple[str, str]] = []
    room = max(0, width)
    for style, text in part.spans:
        if cell_len(text) > room:
            spans.append((style, f"{set_cell_size(text, room - 1).rstrip()}…" if room else ""))
            break
        spans.append((style, text))
        room -= cell_len(text)
    return Piece(tuple(spans))
