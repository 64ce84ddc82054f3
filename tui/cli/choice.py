"""Which model a run begins with: the one named, else the one used last, else the one in the package."""

from pathlib import Path

from ...core.errors import ModelError
from ..user.settings import Settings


def choose_model(name: str | None, settings: Settings, *, yes: bool) -> tuple[Path, str | None]:
    """Its folder, and a sentence where the one used last is gone. `name` may be one that the hub has: then
    the user is asked before it is fetched, unless `yes`. Raises QchatError."""
    from ...core.hub import library

    places = library.Places.of(settings["models_dir"])
    named = name or settings["model"]
    if not named:
        return library.usual(places)
    try:
        folder = library.find(named, places)
    except library.NotHere:
        from .verbs.pull import obtain

        folder = obtain(named, yes=yes, places=places)
    library.remember(folder, places)
    return folder, None


def is_path_or_model(name: str) -> bool:
    """Tell whether `name` is a path, a model on this machine, or a published one. Raises UsageError."""
    from ...core.hub import library

    try:
        return Path(name).exists() or bool(
            library.find(name, library.Places.of(Settings.load()["models_dir"]))
        )
    except library.NotHere:
        return True
    except ModelError:
        return False
