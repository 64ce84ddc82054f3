"""The base of the full-height lists: a title, a filter, columns that give way when narrow, keys below.

A list is dismissed with a command line for the chat to run, or with None. Text that others wrote is made
printable here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from ..text.report import Report, report_lines
from ..text.sanitise import cut, fit, printable, wrap
from ..widgets.choices import Choices
from ..widgets.hints import Hint, hint_line

CSS = Path(__file__).parents[2] / "themes" / "screens.tcss"
GAP = "  "
LEAST_NAME = 24  # cells
UNDO_SECONDS = 5.0  # in which a deletion can be undone
# the colours of a report's styles
STYLES = {
    "title": "bold $primary",
    "dim": "$text-muted",
    "accent": "$accent",
    "good": "$success",
    "warn": "$warning",
    "bad": "$error",
    "bar": "$primary",
}
Keys = Sequence[Hint]


@dataclass(frozen=True)
class Column:
    """A column of `width` cells, or of all that are left for 0; the highest `rank` is dropped first."""

    title: str
    width: int = 0
    align: str = "left"
    rank: int = 0


@dataclass(frozen=True)
class Row:
    """A row, whose `id` dismisses the list. `style` is for the cells from the third on, `styles` for some.

    Of a `heading` only the second cell is shown, over the whole width; the cursor passes it by.
    """

    id: str
    cells: tuple[str, ...]
    style: str = "$text-muted"
    styles: Mapping[int, str] = field(default_factory=dict)
    heading: bool = False


def heading(text: str) -> Row:
    """Return a heading for the rows below it."""
    return Row("", ("", text), heading=True)


def shown_columns(columns: Sequence[Column], width: int) -> list[tuple[int, int]]:
    """Return the columns that fit into `width` cells, as (position, cells)."""
    kept = list(range(len(columns)))

    def left() -> int:
        return width - sum(columns[n].width for n in kept) - len(GAP) * (len(kept) - 1)

    while left() < LEAST_NAME and len(kept) > 1:
        worst = max(kept, key=lambda n: (columns[n].rank, n))
        if not columns[worst].rank:
            break
        kept.remove(worst)
    free = max(1, left())
    return [(n, columns[n].width or free) for n in kept]


def painted(row: Row, columns: Sequence[Column], width: int, style: str | None = None) -> Content:
    """Return `row` in columns, in at most `width` cells."""
    if row.heading:
        return Content.styled(one_line(row.cells[1], width), "$text-muted bold")
    parts: list[Content] = []
    for n, cells in shown_columns(columns, width):
        text = fit(" ".join(printable(row.cells[n]).split()), cells, columns[n].align)
        own = row.styles.get(n, row.style if n > 1 else "") if style is None else style
        parts += [Content(GAP)] * bool(parts) + [Content.styled(text, own)]
    return Content("").join(parts)


def drawn(report: Report, width: int) -> Content:
    """Return a report's lines as content."""
    lines = [
        Content.assemble(*((text, STYLES.get(style, "")) for style, text in line))
        for line in report_lines(report, width)
    ]
    return Content("\n").join(lines)


class Ask(ModalScreen[str | None]):
    """A question for one line of text; dismissed with it, or None."""

    CSS_PATH = CSS
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,ctrl+c", "dismiss(None)", "close", priority=True)
    ]

    def __init__(self, question: str, text: str = ""):
        super().__init__()
        self._question, self._text = question, printable(text)

    def compose(self) -> ComposeResult:
        with Vertical(classes="sheet-ask"):
            yield Static(Content(printable(self._question)))
            yield Input(self._text, compact=True, select_on_focus=False)
            yield Static(hint_line((("enter", "accept"), ("esc", "leave"))))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.dismiss(event.value.strip() or None)


class Listing(ModalScreen[str | None]):
    """A list; subclasses define `HEADING`, `COLUMNS` and `KEYS`, and fill `rows`."""

    CSS_PATH = CSS
    AUTO_FOCUS = "#sheet-list"
    HEADING: ClassVar[str] = ""
    EMPTY: ClassVar[str] = "Nothing here."
    HINT: ClassVar[str] = "/ to filter"
    COLUMNS: ClassVar[tuple[Column, ...]] = ()
    KEYS: ClassVar[Keys] = ()
    FILTER_KEYS: ClassVar[Keys] = (("enter", "choose"), ("↓", "list"), ("esc", "close"))
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,ctrl+c", "leave", "close", priority=True),
        Binding("slash", "filter", "filter"),
        Binding("down", "to_list", show=False),
        Binding("j", "cursor('down')", show=False),
        Binding("k", "cursor('up')", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._visible: list[Row] = []
        self._bright: int | None = None  # the row painted as the cursor's

    # --- what subclasses may change ---

    def heading(self) -> str:
        return self.HEADING

    def empty(self) -> str:
        """Return what a list without rows says: what to do."""
        return self.EMPTY

    def detail(self) -> ComposeResult:
        """Yield widgets right of the list."""
        yield from ()

    def matching(self, text: str) -> list[Row]:
        """Return the rows that contain all words of `text`."""
        words = text.casefold().split()
        return [
            row
            for row in self.rows
            if not (words and row.heading) and all(word in " ".join(row.cells).casefold() for word in words)
        ]

    def highlighted(self, row: Row | None) -> None:
        """Follow the cursor to another row."""

    def resized(self) -> None:
        """Adapt to another size of the screen."""

    def chosen(self, row: Row) -> None:
        """Handle enter on a row."""
        self.dismiss(row.id)

    # --- the rest ---

    def compose(self) -> ComposeResult:
        with Vertical(classes="sheet"):
            with Horizontal(classes="sheet-head"):
                yield Static(id="sheet-title")
                yield Input(placeholder=self.HINT, id="sheet-filter", compact=True)
            with Horizontal(classes="sheet-body"):
                with Vertical(classes="sheet-left"):
                    yield Static(id="sheet-columns")
                    yield Choices(id="sheet-list", compact=True)
                yield from self.detail()
            yield Static(id="sheet-keys")

    def on_mount(self) -> None:
        self.show_heading()
        self._show_keys()

    def show_heading(self) -> None:
        self.query_one("#sheet-title", Static).update(Content.styled(printable(self.heading()), "bold"))

    @property
    def options(self) -> OptionList:
        return self.query_one("#sheet-list", OptionList)

    @property
    def filter(self) -> Input:
        return self.query_one("#sheet-filter", Input)

    @property
    def is_open(self) -> bool:
        """Whether the list is still shown; it may be dismissed while a worker waits for its rows."""
        return self in self.app.screen_stack

    @property
    def current(self) -> Row | None:
        place = self.options.highlighted
        row = self._visible[place] if place is not None and place < len(self._visible) else None
        return None if row is None or row.heading else row

    def show_rows(self, rows: list[Row] | None = None) -> None:
        """Draw the list anew; the cursor stays on its row if that still exists."""
        if rows is not None:
            self.rows = rows
        before = self.current.id if self.current else None
        self._visible = self.matching(self.filter.value)
        width = self._width()
        self.options.clear_options()
        drawn = ((painted(row, self.COLUMNS, width), row.heading) for row in self._visible)
        self.options.add_options([Option(content, disabled=heads) for content, heads in drawn])
        if not self._visible:
            said = "\n".join(wrap(self.empty(), width))
            self.options.add_option(Option(Content.styled(said, "$text-muted"), disabled=True))
        header = painted(Row("", tuple(c.title for c in self.COLUMNS)), self.COLUMNS, width, "$text-muted")
        self.query_one("#sheet-columns", Static).update(header)
        shown = [(place, row) for place, row in enumerate(self._visible) if not row.heading]
        places = [place for place, row in shown if row.id == before] or [place for place, _ in shown]
        self._bright = None
        self.options.highlighted = next(iter(places), None)
        self._paint_cursor()
        self.highlighted(self.current)

    def _paint_cursor(self) -> None:
        """Paint the row under the cursor in one colour, because dim cells could not be read there."""
        before, self._bright = self._bright, self.options.highlighted if self._visible else None
        for place in (before, self._bright):
            if place is None:
                continue
            style = "" if place == self._bright else None
            row = painted(self._visible[place], self.COLUMNS, self._width(), style)
            self.options.replace_option_prompt_at_index(place, row)

    def _width(self) -> int:
        return max(
            10, self.query_one("#sheet-columns").size.width
        )  # padded like the rows, scrollbar included

    def _show_keys(self) -> None:
        keys = self.FILTER_KEYS if self.filter.has_focus else self.KEYS
        # a cell of padding on either side
        self.query_one("#sheet-keys", Static).update(hint_line(keys, max(1, self.size.width - 2)))

    def on_resize(self, _: events.Resize) -> None:
        self.resized()
        self._show_keys()
        self.call_after_refresh(self.show_rows)

    @on(events.DescendantFocus)
    def _focus_moved(self) -> None:
        self._show_keys()

    @on(Input.Changed, "#sheet-filter")
    def _filtered(self, event: Input.Changed) -> None:
        event.stop()
        self.filter_changed(event.value)

    def filter_changed(self, _text: str) -> None:
        self.show_rows()

    @on(Input.Submitted, "#sheet-filter")
    def _accepted(self, event: Input.Submitted) -> None:
        event.stop()
        if self.current is not None:
            self.chosen(self.current)

    @on(OptionList.OptionHighlighted, "#sheet-list")
    def _moved(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        if self.options.highlighted != self._bright:
            self._paint_cursor()
            self.highlighted(self.current)

    @on(OptionList.OptionSelected, "#sheet-list")
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if self.current is not None:
            self.chosen(self.current)

    def action_filter(self) -> None:
        self.filter.focus()

    def action_to_list(self) -> None:
        self.options.focus()

    def action_cursor(self, way: str) -> None:
        if not self.filter.has_focus:
            self.options.action_cursor_down() if way == "down" else self.options.action_cursor_up()

    def action_leave(self) -> None:
        """Empty the filter, where more may be typed; if it is empty, go to the chat."""
        if self.filter.has_focus and self.filter.value:
            self.filter.value = ""
        else:
            self.dismiss(None)

    def say(self, sentence: str, kind: str = "information", seconds: float = 5.0) -> None:
        severity = "error" if kind == "error" else "information"
        self.notify(printable(sentence), severity=severity, timeout=seconds, markup=False)


def one_line(text: str, width: int) -> str:
    return cut(" ".join(printable(text).split()), width)
