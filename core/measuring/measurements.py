"""Measurements of models on this machine, kept between runs in a file of JSON lines; the newest counts.

A measurement belongs to the weight files as they were: once they change it is no longer found. Damaged lines
are skipped, because everything can be measured again. Imports no MLX.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint.shards import find_shards, stamp_files
from ..errors import StoreError
from ..machine.files import write_whole

MAX_LINES = 1000
MAX_NBYTES = 16 << 20


class Measurements:
    """The measurements in the file `path`, which need not exist."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, folder: Path, figures: Mapping[str, Any]) -> None:
        """Store `figures` of the model in `folder`.

        Raises StoreError where the file cannot be written, ModelError for the folder.
        """
        line = json.dumps({"weights": _weights_digest(folder), **figures}, allow_nan=False)
        lines = [*self._lines()[1 - MAX_LINES :], line]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(self.path, "\n".join(lines) + "\n")
        except OSError as error:
            raise StoreError(f"the measurement cannot be stored in {self.path}: {error.strerror}") from error

    def find(self, folder: Path) -> dict[str, Any]:
        """Return the newest value of each figure of the model in `folder`; empty where there are none.

        Raises ModelError for the folder.
        """
        digest, found = _weights_digest(folder), {}
        for line in self._lines():
            with suppress(ValueError):
                figures = json.loads(line)
                if isinstance(figures, dict) and figures.pop("weights", None) == digest:
                    found |= figures
        return found

    def _lines(self) -> list[str]:
        try:
            with self.path.open("rb") as file:
                return file.read(MAX_NBYTES).decode("utf-8", "replace").splitlines()
        except OSError:
            return []


def _weights_digest(folder: Path) -> str:
    """Hash the folder's path and the name, size and time of every weight file."""
    text = str(folder.resolve()) + stamp_files(folder, find_shards(folder).paths)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
