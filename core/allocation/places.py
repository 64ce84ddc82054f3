"""Where a model's sensitivities are kept: in a file beside its folder, or where the user says.

Finds the file, or has it made. Refuses one that belongs to another model or text.
"""

import os
from pathlib import Path

from ..conversion.layer_rounding import MAX_TEXT_NBYTES
from ..conversion.source import Source
from ..errors import UsageError
from ..hub.cache import FOLDER
from ..hub.names import model_name
from ..machine.files import read_text, user_folder
from .measure import Report, measure_sensitivity, text_digest
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


def find_sensitivity(source: Source, path: Path, text: Path | None, report: Report) -> Sensitivity:
    """Read the file at `path`, or measure it there. Raises UsageError, ModelError, DoesNotFit."""
    if path.exists():
        return read_for(source, path, text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the sensitivities cannot go to {path}: {error.strerror}") from error
    return measure_sensitivity(source, path, text=text, report=report)


def read_for(source: Source, path: Path, text: Path | None = None) -> Sensitivity:
    """Read the file at `path`, which must be of this model, and with a `text` have been measured on that.

    Raises UsageError.
    """
    found = read_sensitivity(path)
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
