"""List the models on this machine and published ones to download, with sizes and what fits; or delete
one."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ....core.errors import UsageError
from ...text.columns import columns
from ...text.output import write
from ...user.settings import Settings

if TYPE_CHECKING:
    from ....core.hub.library import Fit, LocalModel, Locations, PublishedModel

GB = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_list, json=False)
    actions = parser.add_subparsers(metavar="ACTION", title="actions")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    removed = actions.add_parser(
        "rm", help="delete a model", description="Delete the files of a model.", allow_abbrev=False
    )
    removed.add_argument("name", metavar="NAME", help="as `qchat models` lists it")
    removed.add_argument("--yes", action="store_true", help="delete without asking")
    removed.set_defaults(action=_remove)


def run(args: argparse.Namespace) -> int:
    """Do what was asked; returns the exit code. Raises QchatError."""
    from ....core.hub import library

    args.action(library.Locations.from_setting(Settings.load()["models_dir"]), args)
    return 0


def _list(places: "Locations", args: argparse.Namespace) -> None:
    from ....core.hub import library

    here, known = library.list_models(places), library.list_published(places)
    if args.json:
        report = {"models": [one.as_json() for one in here], "published": [_json(one) for one in known]}
        write(sys.stdout, json.dumps(report, ensure_ascii=False, indent=2) + "\n")
        return
    write(sys.stdout, f"On this machine\n\n{_here_table(here)}\n")
    write(sys.stdout, f"Available with `qchat pull ID`\n\n{_known_table(known)}")
    for sentence in library.missing_folder_notices(places):
        write(sys.stderr, f"qchat: {sentence}\n")


def _remove(places: "Locations", args: argparse.Namespace) -> None:
    from ....core.hub import library

    removal = library.plan_removal(library.select_model(args.name, library.list_models(places)))
    size = f"{removal.nbytes / GB:.2f} GB in {len(removal.paths)} files"
    about = f"{removal.model.name}: {size} in {removal.model.path}"
    if not args.yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{about}: give --yes to delete it, since nobody can be asked here")
        from .pull import confirm

        if not confirm(about, "Delete it?"):
            return
    kept = removal.execute()
    write(sys.stderr, f"qchat: deleted {about}\n")
    if kept:
        names = ", ".join(path.name for path in kept[:5])
        write(sys.stderr, f"qchat: {removal.model.path} also holds {names}, which is not part of the model\n")


def _here_table(models: "Sequence[LocalModel]") -> str:
    rows = [("name", "size", "bits/weight", "fits", "where")]
    for model in models:
        bits = "" if model.bits_per_weight is None else f"{model.bits_per_weight:.2f}"
        where = f"{model.origin}: {model.problem}" if model.problem else model.origin
        rows.append((model.name, f"{model.nbytes / GB:.2f} GB", bits, _fits(model.fit), where))
    return columns(rows, right=(1, 2))


def _known_table(models: "Sequence[PublishedModel]") -> str:
    rows = [
        (model.id, f"{model.nbytes / GB:.1f} GB", f"{model.bits_per_weight:.2f}", _fits(model.fit))
        for model in models
    ]
    return columns([("id", "size", "bits/weight", "fits"), *rows], right=(1, 2))


def _fits(fit: "Fit | None") -> str:
    if fit is None:
        return ""
    return f"yes, {fit.context:,} tokens" if fit.fits else f"no, needs {fit.needed_nbytes / GB:.1f} GB"


def _json(model: "PublishedModel") -> dict[str, Any]:
    return asdict(model) | {"fit": model.fit.as_json()}
