"""The widgets that show the panes: a panel beside the conversation, and a strip of one or two rows below it.

Both draw the same facts when something has moved, at most four times a second, and then repaint only the
rows that differ. No timer runs while nothing moves.
"""

import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.timer import Timer
from textual.widget import Widget

from ...text.report import Line
from ...text.sanitise import printable
from .branches import branch_of_row, ends_of
from .drawing import cut_line, line_cells
from .facts import Pane, PaneFacts
from .layout import PANES, share_rows

PAINT_SECONDS = 0.25
STYLES = (
    "frame", "title", "dim", "big", "spark", "shade", "track", "ok", "warn", "hot", "weights", "keys",
    "snapshots", "cache", "peak", "reused", "read", "new", "thought", "here", "star", "cursor",
)  # fmt: skip


class Panes(Widget):
    """Shows panes; `shown` has their names, `source` returns the facts. Call `moved` when they change."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"panes--{name}" for name in STYLES}

    def __init__(self, source: Callable[[], PaneFacts], *, id: str):
        super().__init__(id=id)
        self._source = source
        self.shown: Sequence[str] = [pane.name for pane in PANES]
        self.painted = 0  # how often anything was drawn
        self._rows: list[Line] | None = None
        self._drawn_at = 0.0
        self._timer: Timer | None = None

    @property
    def panes(self) -> list[Pane]:
        """The panes to show, in their order."""
        return [pane for pane in PANES if pane.name in self.shown]

    def draw(self, facts: PaneFacts, width: int, height: int) -> list[Line]:
        raise NotImplementedError

    def in_sight(self) -> set[str]:
        """Return the names of the panes that are drawn now."""
        return self._drawn_names(self._source()) if self.display and self.size else set()

    def _drawn_names(self, facts: PaneFacts) -> set[str]:
        raise NotImplementedError

    def moved(self) -> None:
        """Draw what has changed, now or, if that was done just now, a little later."""
        if not self.display:
            self._rows = None
        elif self._timer is None:
            wait = self._drawn_at + PAINT_SECONDS - time.monotonic()
            if wait > 0:
                self._timer = self.set_timer(wait, self._catch_up)
            else:
                self._catch_up()

    def _catch_up(self) -> None:
        self._timer = None
        before, after = self._rows, self._draw()
        if before is None or len(before) != len(after):
            self.refresh()
            return
        for y, (old, new) in enumerate(zip(before, after, strict=True)):
            if old != new:
                self.refresh(Region(0, y, self.size.width, 1))

    def _draw(self) -> list[Line]:
        width, height = self.size
        self._rows = self.draw(self._source(), width, height) if width and height else []
        self._drawn_at = time.monotonic()
        self.painted += 1
        return self._rows

    def redraw(self) -> None:
        """Draw everything anew at the next chance."""
        self._rows = None
        self.refresh()

    def on_resize(self) -> None:
        self.redraw()

    def render_line(self, y: int) -> Strip:
        rows = self._draw() if self._rows is None else self._rows
        width, ground = self.size.width, self.rich_style
        segments = [
            Segment(_one_line(text), self.get_component_rich_style(f"panes--{style}") if style else ground)
            for style, text in (rows[y] if y < len(rows) else [])
        ]
        return Strip(segments).adjust_cell_length(width, ground)


class Panel(Panes, can_focus=True):
    """The panes one above the other in a frame. With the focus, the cursor is on a branch."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "step(-1)", show=False),
        Binding("down,j", "step(1)", show=False),
        Binding("enter", "choose", show=False),
    ]

    class BranchChosen(Message):
        """The branch whose last reply has this node number was chosen."""

        def __init__(self, number: int):
            super().__init__()
            self.number = number

    def __init__(self, source: Callable[[], PaneFacts], *, id: str = "panel"):
        super().__init__(source, id=id)
        self.chosen: int | None = None

    def draw(self, facts: PaneFacts, width: int, height: int) -> list[Line]:
        inner = max(width - 4, 1)
        lines: list[Line] = []
        for pane, rows in share_rows(self.panes, facts, height):
            lines.append(self._title(pane, facts, width, first=not lines))
            drawn = pane.lines(facts, inner, rows)[:rows]
            lines += [_framed(line, inner) for line in (*drawn, *([[]] * (rows - len(drawn))))]
        return [*lines, [("frame", f"╰{'─' * max(width - 2, 0)}╯")]] if lines else []

    def _drawn_names(self, facts: PaneFacts) -> set[str]:
        return {pane.name for pane, _ in share_rows(self.panes, facts, self.size.height)}

    def _title(self, pane: Pane, facts: PaneFacts, width: int, *, first: bool) -> Line:
        left, right = ("╭", "╮") if first else ("├", "┤")
        title: Line = [("frame", f"{left}─ "), ("title", pane.name.capitalize()), ("frame", " ")]
        note = pane.note(facts)
        if note and line_cells(title) + line_cells(note) + 6 <= width:
            rest = width - line_cells(title) - line_cells(note) - 4
            return [*title, ("frame", f"{'─' * rest} "), *note, ("frame", f" ─{right}")]
        return [*title, ("frame", f"{'─' * max(width - line_cells(title) - 1, 0)}{right}")]

    def _branch_rows(self) -> tuple[int, int]:
        """Return the first row of the branches and how many there are; none if they are not shown."""
        y = 0
        for pane, rows in share_rows(self.panes, self._source(), self.size.height):
            if pane.name == "branches":
                return y + 1, rows
            y += 1 + rows
        return 0, 0

    @property
    def has_choice(self) -> bool:
        """Whether there are branches to choose from on the screen."""
        return self.display and self._branch_rows()[1] > 0 and len(self._source().state.branches) > 1

    def on_focus(self) -> None:
        self.chosen = next(iter(ends_of(self._source())), None)
        self.moved()

    def on_blur(self) -> None:
        self.chosen = None
        self.moved()

    def action_step(self, step: int) -> None:
        """Move the cursor to the branch above or below."""
        ends = ends_of(self._source())
        if ends:
            place = ends.index(self.chosen) + step if self.chosen in ends else 0
            self.chosen = ends[min(max(place, 0), len(ends) - 1)]
            self._catch_up()

    def action_choose(self) -> None:
        if self.chosen in ends_of(self._source()) and self.chosen is not None:
            self.post_message(self.BranchChosen(self.chosen))

    def on_click(self, event: events.Click) -> None:
        first, rows = self._branch_rows()
        number = branch_of_row(self._source(), event.y - first, rows)
        if number is not None:
            self.post_message(self.BranchChosen(number))


class PaneStrip(Panes):
    """The panes side by side in one or two rows; of those that do not fit the last are left out."""

    GAP = 3
    # the first row of two
    UPPER = ("speed", "thinking")

    def draw(self, facts: PaneFacts, width: int, height: int) -> list[Line]:
        rows = [self._side_by_side(row, facts, width)[0] for row in self._rows_of(facts, height)]
        return [row for row in rows if len(row) > 1]  # an empty row would only push the other one down

    def _drawn_names(self, facts: PaneFacts) -> set[str]:
        width, height = self.size
        rows = [self._side_by_side(row, facts, width)[1] for row in self._rows_of(facts, height)]
        return {name for names in rows for name in names}

    def _rows_of(self, facts: PaneFacts, height: int) -> list[list[Pane]]:
        if height > 1:
            upper = [pane for pane in self.panes if pane.name in self.UPPER]
            return [upper, [pane for pane in self.panes if pane.name not in self.UPPER]]
        # while the model thinks, what it thinks comes before the other figures
        first = self.UPPER if facts.status.phase == "thinking" else ()
        return [sorted(self.panes, key=lambda pane: pane.name not in first)]

    def _side_by_side(self, panes: Sequence[Pane], facts: PaneFacts, width: int) -> tuple[Line, list[str]]:
        """Return the panes that fit in one row, and their names."""
        line: Line = [("", " ")]
        names: list[str] = []
        for pane in panes:
            gap = " " * self.GAP if len(line) > 1 else ""
            begun: Line = [*line, ("", gap), ("dim", f"{pane.name.capitalize()} ")]
            brief = pane.brief(facts, width - line_cells(begun) - 1)
            if brief and line_cells(begun) + line_cells(brief) < width:
                line = [*begun, *brief]
                names.append(pane.name)
        return line, names


def _framed(line: Line, width: int) -> Line:
    kept = cut_line(line, width)
    return [("frame", "│ "), *kept, ("frame", " " * (width - line_cells(kept)) + " │")]


def _one_line(text: str) -> str:
    return printable(text).replace("\n", " ").replace("\t", " ")
