"""The models on this machine, and those published that are not: what fits, how fast each was measured.

Typing filters; the keys that do something else act in the list, one step down.
"""

import asyncio
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.binding import Binding, BindingType

from ...core.errors import QchatError
from ..commands.models import measured
from .dialogs import Confirm
from .listing import UNDO_SECONDS, Column, Keys, Listing, Row, one_line

if TYPE_CHECKING:
    from ...core.hub.catalog import Fit, PublishedModel
    from ...core.hub.library import LocalModel, Locations, Removal
    from ..chat.controller import Chat
    from ..commands import Front

GB = 10**9
TIGHT = 0.05  # of the memory: less than this left over is close
MARK, COMPARED, PUBLISHED = "●", "◆", "↓"
FITS = 4  # the column that says so
FIT_STYLES = {"✓": "$success", "~": "$warning", "✗": "$error"}


class ModelsScreen(Listing):
    """Dismissed with /load, /bench, /convert, /compare or /inspect of what was chosen."""

    AUTO_FOCUS = "#sheet-filter"
    EMPTY = "no model matches"
    HINT = "type to filter"
    COLUMNS = (
        Column("", 1),
        Column("name"),
        Column("quant", 8, "right", rank=2),
        Column("size", 8, "right"),
        Column("fits?", 12),
        Column("tok/s*", 6, "right", rank=3),
        Column("KL*", 6, "right", rank=5),
        Column("ctx max", 7, "right", rank=4),
    )
    KEYS: ClassVar[Keys] = (
        ("enter", "load"),
        ("b", "bench"),
        ("c", "convert"),
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
        Binding("c", "command('convert')", show=False),
        Binding("i", "command('inspect')", show=False),
        Binding("space", "compare", show=False),
        Binding("d", "delete", show=False),
        Binding("u", "undo", show=False),
    ]

    def __init__(self, places: "Locations", loaded: str | None = None):
        super().__init__()
        self._places, self._loaded = places, loaded
        # by folder, `decode_tokens_per_s` and `kl_mean` as far as they were measured
        self._measured: dict[str, dict[str, Any]] = {}
        self._models: dict[str, LocalModel] = {}
        self._published: list[PublishedModel] = []
        self._compared: str | None = None
        self._removal: Removal | None = None  # agreed to, and not carried out yet

    def heading(self) -> str:
        return f"Models  {' · '.join(map(short, self._places.folders))} · HF cache"

    def on_mount(self) -> None:
        super().on_mount()
        self.read()

    @work(exclusive=True)
    async def read(self) -> None:
        from ...core.hub import library

        try:
            here = await asyncio.to_thread(library.list_models, self._places)
            published = await asyncio.to_thread(library.list_published, self._places)
            self._measured = await asyncio.to_thread(measured, here)
        except QchatError as error:
            self.say(str(error), "error")
            return
        self._models = {str(model.path): model for model in here}
        self._published = published
        if self.is_open:
            self.show_rows(self._rows())

    def _rows(self) -> list[Row]:
        here = [
            local_row(model, self._mark(path), self._measured.get(path, {}))
            for path, model in self._models.items()
            if self._removal is None or model != self._removal.model
        ]
        return here + [published_row(one) for one in self._published]

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


def local_row(model: "LocalModel", mark: str, measured: Mapping[str, Any]) -> Row:
    if model.problem is not None:
        why = model.problem.removeprefix(f"{model.path} ")
        cells = (mark or "✗", model.name, "", size(model.nbytes), one_line(why, 40), "", "", "")
        return Row(str(model.path), cells, "$text-muted")
    bits = "" if model.bits_per_weight is None else f"{model.bits_per_weight:.1f} bpw"
    speed, distance = measured.get("decode_tokens_per_s"), measured.get("kl_mean")
    cells = (
        mark,
        model.name,
        bits,
        size(model.nbytes),
        fits(model.fit),
        "–" if speed is None else f"{speed:.1f}",
        "–" if distance is None else f"{distance:.3f}",
        thousands(model.fit.context if model.fit and model.fit.fits else model.context),
    )
    return Row(str(model.path), cells, "$foreground", {FITS: FIT_STYLES.get(cells[FITS][:1], "")})


def published_row(variant: "PublishedModel") -> Row:
    bits, room, name = f"{variant.bits_per_weight:.1f} bpw", variant.fit, variant.id.rpartition("/")[2]
    longest = thousands(room.context if room.fits else variant.context)
    cells = (PUBLISHED, name, bits, size(variant.nbytes), fits(room), "", "", longest)
    return Row(variant.id, cells, styles={1: "$text-muted", FITS: FIT_STYLES.get(cells[FITS][:1], "")})


def fits(fit: "Fit | None") -> str:
    """Whether it fits, and by how many GB."""
    if fit is None:
        return "?"
    left = (fit.limit_nbytes - fit.needed_nbytes) / GB
    if not fit.fits:
        return f"✗ {-left:.1f} short"
    return f"{'~' if left < TIGHT * fit.limit_nbytes / GB else '✓'} {left:.1f} left"


def short(folder: Path) -> str:
    """Shorten a path with ~ for the user's home."""
    home = Path("~").expanduser()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def size(nbytes: int) -> str:
    return f"{nbytes / GB:.1f} GB" if nbytes >= GB / 10 else f"{nbytes / 10**6:.0f} MB"


def thousands(tokens: int | None) -> str:
    return "?" if tokens is None else f"{tokens // 1024}k"


def make(chat: "Chat", front: "Front") -> ModelsScreen:
    from ...core.hub import library

    del front
    return ModelsScreen(
        library.Locations.from_setting(chat.settings["models_dir"]), chat.model.path if chat.model else None
    )
