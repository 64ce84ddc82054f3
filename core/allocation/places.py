"""Where a model's sensitivities are kept: in a file beside its folder, or where the user says.

Finds the file, or has it made. Refuses one that belongs to another model or text.
"""

import os
from pathlib import Path

from ..conversion.source import Source
from ..errors import UsageError
from ..hub.cache import FOLDER
from ..hub.names import model_name
from ..machine.files import read_text, user_folder
from .measure import MAX_TEXT_NBYTES, Report, measure_sensitivity, text_digest
from .sensitivity import Sensitivity, model_identity, read_sensitivity

FILE_NAME = "sensitivity.json"


def default_place(folder: Path) -> Path:
    """Return the file for the model in `folder`: in it if it is there, else beside it.

    Where nothing can be written beside it, and for the cache that other tools share, in the user's data
    folder. Raises UsageError without a home folder.
    """
    folder = folder.absolute()
    if (folder / FILE_NAME).is_file():
        return folder / FILE_NAME
    beside = folder.parent / f"{folder.name}-{FILE_NAME}"
    shared = any(FOLDER.fullmatch(parent.name) for parent in folder.parents)
    if beside.is_file() or (os.access(folder.parent, os.W_OK) and not shared):
        return beside
    data = user_folder("XDG_DATA_HOME", ".local/share")
    if data is None:
        raise UsageError("there is no place for the sensitivities: name a file with --sensitivity")
    return data / "sensitivity" / f"{model_name(folder)}-{FILE_NAME}"


def find_sensitivity(
    source: Source, place: Path | None, text: Path | None, *, measure: bool, report: Report
) -> tuple[Sensitivity, Path]:
    """Read the file at `place`, by default the model's own, or measure it there; return it with its path.

    With a `text`, the file must have been measured on that. Raises UsageError, ModelError, DoesNotFit.
    """
    path = place or default_place(source.folder)
    if path.exists():
        return _checked(read_sensitivity(path), path, source, text), path
    if not measure:
        raise UsageError(f"the sensitivities of {source.folder.name} are not measured yet: {path} is missing")
    _check_place(path, make=place is None)
    return measure_sensitivity(source, path, text=text, report=report), path


def _checked(found: Sensitivity, path: Path, source: Source, text: Path | None) -> Sensitivity:
    if found.model != model_identity(source):
        raise UsageError(
            f"{path} holds the sensitivities of another model than {source.folder}: remove it, or name "
            "another file with --sensitivity"
        )
    if text is not None and found.text != text_digest(read_text(text, UsageError, MAX_TEXT_NBYTES)):
        raise UsageError(
            f"the sensitivities in {path} were measured on another text than {text}: remove the file, name "
            "another one with --sensitivity, or leave out --calibration"
        )
    return found


def _check_place(path: Path, *, make: bool) -> None:
    """Raise UsageError unless a file can be made at `path`."""
    try:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent} cannot be made: {error.strerror}") from error
    if not path.parent.is_dir():
        raise UsageError(f"the sensitivities cannot go to {path}: its folder does not exist")
