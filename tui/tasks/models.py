"""The task `models`: those on this machine and those published, listed or deleted.

One function makes the rows of all lists of models: the report's and the picker's.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ...core.errors import QchatError, UsageError
from ..text.report import Lines, Report, Table
from ..user.paths import measurements_file
from .base import Door, EngineTask, LocalTask, Outcome, add_json
from .variants import Variant

if TYPE_CHECKING:
    from ...core.hub.catalog import Fit, PublishedModel
    from ...core.hub.library import LocalModel, Locations, Removal

GB, MB = 10**9, 10**6
TIGHT = 0.05  # of the memory: less than this left over is close
LOADED, BROKEN = "*", "!"
COLUMNS = ("", "name", "bits/weight", "size", "fits", "tok/s", "KL", "context")
UNKNOWN = "-"
Room = Literal["good", "tight", "none", "unknown"]


class Models(LocalTask):
    """List local and published models, or delete a local one.

    Shows size, bits per weight, whether they fit into memory, the speed and the KL divergence that bench and
    eval measured, and the longest context that fits.
    """

    name = "models"
    usage = "[rm NAME] [OPTIONS]"
    most_models = 2
    screen = "models"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(action="list")
        add_json(parser)
        actions = parser.add_subparsers(metavar="ACTION", title="actions")
        removed = actions.add_parser(
            "rm", help="delete a model", description="Delete the files of a model.", allow_abbrev=False
        )
        removed.add_argument("name", metavar="NAME", help="a name from the list")
        removed.add_argument("--yes", action="store_true", help="delete without asking")
        removed.set_defaults(action="rm")

    def question(self, args: argparse.Namespace, door: Door) -> str:
        if args.action != "rm" or args.yes:
            return ""
        return f"{_about(_removal(args, door))}\nDelete it?"

    def perform(self, args: argparse.Namespace, door: Door) -> Outcome:
        return _remove(args, door) if args.action == "rm" else list_outcome(door)


@dataclass(frozen=True)
class Shelf:
    """The models to list; `figures` are those measured, by folder, and `notices` missing models folders."""

    here: "list[LocalModel]"
    published: "list[PublishedModel]"
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRow:
    """One model of a list: the words in COLUMNS, what to load, and how much room it leaves."""

    target: str
    cells: tuple[str, ...]
    room: Room
    where: str
    problem: str | None = None


def read_shelf(places: "Locations") -> Shelf:
    """Find the models, and what was measured of them. Raises ModelError."""
    from ...core.hub import library

    here = library.list_models(places)
    notices = tuple(library.missing_folder_notices(places))
    return Shelf(here, library.list_published(places), measured(here), notices)


def measured(models: "list[LocalModel]") -> dict[str, dict[str, Any]]:
    """Return what bench and eval found out of those that can be loaded, by folder."""
    from ...core import Measurements

    kept = Measurements(measurements_file())
    return {str(model.path): kept.find(model.path) for model in models if model.problem is None}


def measured_variants(places: "Locations") -> list[Variant]:
    """Return those measured with qchat's own text. Raises ModelError."""
    from ...core.hub import library

    models = library.list_models(places)
    figures = measured(models)
    found = [(model, figures.get(str(model.path), {})) for model in models]
    return [
        Variant(str(model.path), model.name, model.nbytes, float(known["kl_mean"]), str(known["reference"]))
        for model, known in found
        if known.get("kl_mean") is not None and known.get("reference")
    ]


def known_variants(task: EngineTask, args: argparse.Namespace, door: Door) -> Sequence[Variant]:
    """Return the models that a task's result is shown beside; none where they cannot be read."""
    try:
        return measured_variants(door.places) if task.compares(args) else ()
    except QchatError:
        return ()


def local_row(model: "LocalModel", figures: Mapping[str, Any], *, loaded: bool = False) -> ModelRow:
    """Return the row of a model on this machine."""
    fit = model.fit
    context = fit.context if fit is not None and fit.fits else model.context
    cells = (
        LOADED if loaded else BROKEN if model.problem else "",
        model.name,
        format_figure(model.bits_per_weight, ".2f"),
        format_size(model.nbytes),
        format_fit(fit),
        format_figure(figures.get("decode_tokens_per_s"), ".1f"),
        format_figure(figures.get("kl_mean"), ".3f"),
        format_figure(context, ","),
    )
    return ModelRow(str(model.path), cells, room_of(fit), model.origin, model.problem)


def published_row(model: "PublishedModel") -> ModelRow:
    """Return the row of a model that can be downloaded."""
    fit = model.fit
    cells = (
        "",
        model.id,
        format_figure(model.bits_per_weight, ".2f"),
        format_size(model.nbytes),
        format_fit(fit),
        "",
        "",
        format_figure(fit.context if fit.fits else model.context, ","),
    )
    return ModelRow(model.id, cells, room_of(fit), "published")


def short_name(id: str) -> str:
    """Return a published model's name without its owner and the ending that all have."""
    return id.rpartition("/")[2].removesuffix("-mlx")


def format_figure(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def format_size(nbytes: int) -> str:
    return f"{nbytes / GB:,.2f} GB" if nbytes >= GB / 10 else f"{nbytes / MB:,.0f} MB"


def format_fit(fit: "Fit | None") -> str:
    """Say whether a model fits into memory, and by how many GB."""
    if fit is None:
        return UNKNOWN
    left = (fit.limit_nbytes - fit.needed_nbytes) / GB
    return f"yes, {left:.1f} GB left" if fit.fits else f"no, {-left:.1f} GB short"


def room_of(fit: "Fit | None") -> Room:
    if fit is None:
        return "unknown"
    if not fit.fits:
        return "none"
    return "tight" if fit.limit_nbytes - fit.needed_nbytes < TIGHT * fit.limit_nbytes else "good"


def list_outcome(door: Door) -> Outcome:
    """Return both lists."""
    shelf = read_shelf(door.places)
    value = {
        "models": [one.as_json() for one in shelf.here],
        "published": [asdict(one) | {"fit": one.fit.as_json()} for one in shelf.published],
    }
    loaded = str(door.model) if door.model else None
    return Outcome(list_report(shelf, loaded), shelf.notices, value)


def list_report(shelf: Shelf, loaded: str | None = None) -> Report:
    """Return the lists as tables; the `loaded` one is marked."""
    here = [
        local_row(one, shelf.figures.get(str(one.path), {}), loaded=str(one.path) == loaded)
        for one in shelf.here
    ]
    where = [(*row.cells, f"{row.where}: {row.problem}" if row.problem else row.where) for row in here]
    known = [published_row(one).cells for one in shelf.published]
    return Report(
        "Models on this machine",
        (
            Table((*COLUMNS, "where"), where, "<<>><>>><"),
            Lines(("", "Published models; `qchat pull ID` or /load ID downloads one"), "title"),
            Table(COLUMNS, known, "<<>><>>>"),
        ),
    )


def _removal(args: argparse.Namespace, door: Door) -> "Removal":
    """Return what would be deleted. Raises ModelError, and UsageError for the loaded model."""
    from ...core.hub import library

    model = library.select_model(args.name, library.list_models(door.places))
    if door.model is not None and model.path.resolve() == door.model.resolve():
        raise UsageError(f"{model.name} is loaded: load another model first")
    return library.plan_removal(model)


def _about(removal: "Removal") -> str:
    size = f"{removal.nbytes / GB:.2f} GB in {len(removal.paths)} files"
    return f"{removal.model.name}: {size} in {removal.model.path}"


def _remove(args: argparse.Namespace, door: Door) -> Outcome:
    removal = _removal(args, door)
    kept = removal.execute()
    notes = [f"deleted {_about(removal)}"]
    if kept:
        names = ", ".join(path.name for path in kept[:5])
        notes.append(f"{removal.model.path} also holds {names}, which is not part of the model")
    return Outcome(Report(""), notes)


TASK = Models()
