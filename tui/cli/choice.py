"""The model to start with: the one named, else the most recently used, else the built-in one."""

from pathlib import Path

from ...core.errors import ModelError
from ..user.settings import Settings


def choose_model(name: str | None, settings: Settings, *, yes: bool) -> tuple[Path, str | None]:
    """Return the model's folder, and a sentence if the most recently used one cannot be loaded.

    A model that is only on the hub is downloaded; unless `yes`, the user is asked first. Raises QchatError.
    """
    from ...core.hub import library

    places = library.Locations.from_setting(settings["models_dir"])
    named = name or settings["model"]
    if not named:
        return library.default_model(places)
    try:
        folder = library.find_model(named, places)
    except library.ModelNotDownloaded:
        from .verbs.pull import find_or_download

        folder = find_or_download(named, yes=yes, places=places)
    library.record_use(folder, places)
    return folder, None


def is_path_or_model(name: str) -> bool:
    """Tell whether `name` is a path, a model on this machine, or a published one. Raises UsageError."""
    from ...core.hub import library

    try:
        return Path(name).exists() or bool(
            library.find_model(name, library.Locations.from_setting(Settings.load()["models_dir"]))
        )
    except library.ModelNotDownloaded:
        return True
    except ModelError:
        return False
