"""The models on this machine, and those published that are not: what fits, how fast each was measured.

Typing filters; the keys that do something else act in the list, one step down.
"""

import asyncio
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.binding import Binding, BindingType

from ...core.errors import QchatError
from ...core.hub.catalog import rank_models
from ..tasks.models import COLUMNS, ModelRow, Room, Shelf, local_row, published_row, read_shelf, short_name
from .convert_form import ConvertForm
from .dialogs import Confirm
from .listing import UNDO_SECONDS, Column, Keys, Listing, Row, heading, one_line

if TYPE_CHECKING:
    from ...core.hub.library import LocalModel, Locations, Removal
    from ..chat.controller import Chat
    from ..commands import Front

GB = 10**9
MARK, COMPARED, PUBLISHED, BEST = "●", "◆", "↓", "★"
NAME, FITS = COLUMNS.index("name"), COLUMNS.index("fits")
# of each column: its width, its side, and which gives way first
LAYOUT: tuple[tuple[int, str, int], ...] = (
    (1, "left", 0),
    (0, "left", 0),
    (11, "right", 2),
    (9, "right", 0),
    (18, "left", 0),
    (6, "right", 3),
    (6, "right", 5),
    (8, "right", 4),
)
ROOM_STYLES: Mapping[Room, str] = {"good": "$success", "tight": "$warning", "none": "$error", "unknown": ""}


class ModelsScreen(Listing):
    """Dismissed with /load, /bench, /convert, /compare or /inspect of what was chosen."""

    AUTO_FOCUS = "#sheet-filter"
    EMPTY = "No model matches. esc empties the filter; /load OWNER/NAME downloads any model of the hub."
    HINT = "type to filter"
    COLUMNS = tuple(map(Column, COLUMNS, *zip(*LAYOUT, strict=True)))
    KEYS: ClassVar[Keys] = (
        ("enter", "load"),
        ("b", "bench"),
        ("c", "convert…"),
        ("space", "compare"),
        ("i", "info"),
        ("d", "delete…"),
        ("/", "filter"),
        ("esc", "close"),
    )
    FILTER_KEYS: ClassVar[Keys] = (
        ("enter", "load"),
        ("↓", "to the list: bench, convert, compare, info, delete"),
        ("esc", "close"),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("b", "command('bench')", show=False),
        Binding("c", "convert", show=False),
        Binding("i", "command('inspect')", show=False),
        Binding("space", "compare", show=False),
        Binding("d", "delete", show=False),
        Binding("u", "undo", show=False),
    ]

    def __init__(self, places: "Locations", chat: "Chat"):
        super().__init__()
        self._places, self._chat = places, chat
        self._loaded = chat.model.path if chat.model else None
        self._shelf = Shelf([], [])
        self._models: dict[str, LocalModel] = {}
        self._compared: str | None = None
        self._removal: Removal | None = None  # agreed to, and not carried out yet

    def heading(self) -> str:
        return f"Models  {' · '.join(map(short, self._places.folders))} · HF cache"

    def on_mount(self) -> None:
        super().on_mount()
        self.read()

    @work(exclusive=True)
    async def read(self) -> None:
        try:
            self._shelf = await asyncio.to_thread(read_shelf, self._places)
        except QchatError as error:
            self.say(str(error), "error")
            return
        self._models = {str(model.path): model for model in self._shelf.here}
        if self.is_open:
            self.show_rows(self._rows())

    def _rows(self) -> list[Row]:
        here = [
            picker_row(local_row(model, self._shelf.figures.get(path, {})), self._mark(path))
            for path, model in self._models.items()
            if self._removal is None or model != self._removal.model
        ]
        ranked = [published_row(one) for one in rank_models(self._shelf.published)]
        there = [published_picker_row(row, best=row is ranked[0] and row.room != "none") for row in ranked]
        return [
            heading("On this machine"),
            *here,
            *([heading("To download, the most useful on this machine first")] if there else []),
            *there,
        ]

    def _mark(self, path: str) -> str:
        return COMPARED if path == self._compared else MARK if path == self._loaded else ""

    @property
    def chosen_path(self) -> str | None:
        """Return the id of the model under the cursor if it is on this machine."""
        return self.current.id if self.current and self.current.id in self._models else None

    def chosen(self, row: Row) -> None:
        model = self._models.get(row.id)
        if model is not None and model.problem is not None:
            self.say(model.problem, "error")
        else:
            self.dismiss(f"/load {row.id}")

    def action_command(self, name: str) -> None:
        if self.chosen_path is not None:
            self.dismiss(f"/{name} {shlex.quote(self.chosen_path)}")

    @work
    async def action_convert(self) -> None:
        """Convert the model under the cursor as a form says."""
        if self.chosen_path is None:
            return
        line = await self.app.push_screen_wait(ConvertForm(self._models[self.chosen_path], self._chat))
        if line is not None:
            self.dismiss(line)

    def action_compare(self) -> None:
        """The first press marks one, the second on another one compares both."""
        path = self.chosen_path
        if path is None:
            return
        if self._compared not in (None, path):
            self.dismiss(f"/compare {shlex.quote(str(self._compared))} {shlex.quote(path)}")
            return
        self._compared = path if self._compared is None else None
        self.show_rows(self._rows())

    @work
    async def action_delete(self) -> None:
        from ...core.hub import library

        path = self.chosen_path
        if path is None:
            return
        if path == self._loaded:
            self.say("this model is loaded: load another one first", "error")
            return
        try:
            removal = library.plan_removal(self._models[path])
            question = (
                f"Delete {len(removal.paths)} files, {removal.nbytes / GB:,.2f} GB, of {removal.model.name}?"
            )
            if await self.app.push_screen_wait(Confirm(question)):
                await self._delete_soon(removal)
        except QchatError as error:
            self.say(str(error), "error")

    async def _delete_soon(self, removal: "Removal") -> None:
        """Until a while has passed, or the screen is left, `u` keeps the model."""
        await self._delete(self._removal)
        self._removal = removal
        self.show_rows(self._rows())
        self.say(f"deleting: {removal.model.name} · u keeps it", seconds=UNDO_SECONDS)
        self.set_timer(UNDO_SECONDS, lambda: self._delete(removal))

    async def _delete(self, removal: "Removal | None") -> None:
        """Carry `removal` out unless it was taken back, or is done."""
        if removal is None or removal is not self._removal:
            return
        self._removal = None
        try:
            kept = await asyncio.to_thread(removal.execute)
            self.say(f"deleted: {removal.model.name}" + (f"; {len(kept)} other files stay" if kept else ""))
        except QchatError as error:
            self.say(str(error), "error")
        if self.is_open:
            self.read()

    def action_undo(self) -> None:
        if self._removal is not None:
            self.say(f"kept: {self._removal.model.name}")
            self._removal = None
            self.show_rows(self._rows())

    async def on_unmount(self) -> None:
        await self._delete(self._removal)


def picker_row(model: ModelRow, mark: str = "") -> Row:
    """Return a model's row with the picker's marks and colours."""
    _, *cells = model.cells
    if model.problem is not None:
        cells[FITS - 1] = one_line(model.problem.removeprefix(f"{model.target} "), 40)
        return Row(model.target, (mark or "✗", *cells), "$text-muted")
    styles = {FITS: ROOM_STYLES[model.room]}
    return Row(model.target, (mark, *cells), "$foreground", styles)


def published_picker_row(model: ModelRow, *, best: bool = False) -> Row:
    """Return the same for a model to download, by its short name; the `best` one here is marked."""
    _, name, *cells = model.cells
    styles = {NAME: "$foreground" if best else "$text-muted", FITS: ROOM_STYLES[model.room]}
    return Row(model.target, (BEST if best else PUBLISHED, short_name(name), *cells), styles=styles)


def short(folder: Path) -> str:
    """Shorten a path with ~ for the user's home."""
    home = Path("~").expanduser()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def make(chat: "Chat", front: "Front") -> ModelsScreen:
    from ...core.hub import library

    del front
    return ModelsScreen(library.Locations.from_setting(chat.settings["models_dir"]), chat)
