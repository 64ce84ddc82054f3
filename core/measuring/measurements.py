"""What was measured of models on this machine, kept between runs: a file of JSON lines, the newest counts.

A measurement belongs to the weight files as they were; after a change of theirs it is not found any more.
A damaged line is passed over, since every line can be measured again. Imports no MLX.
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
    """The measurements in `path`, which need not exist."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, folder: Path, figures: Mapping[str, Any]) -> None:
        """Keep `figures` of the model in `folder`. Raises StoreError where the disk refuses, ModelError for
        the folder."""
        line = json.dumps({"weights": _mark(folder), **figures}, allow_nan=False)
        lines = [*self._lines()[1 - MAX_LINES :], line]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(self.path, "\n".join(lines) + "\n")
        except OSError as error:
            raise StoreError(f"the measurement cannot be kept in {self.path}: {error.strerror}") from error

    def of(self, folder: Path) -> dict[str, Any]:
        """All that is known of the model in `folder`, newer figures over older; empty where nothing is.

        Raises ModelError for the folder.
        """
        mark, found = _mark(folder), {}
        for line in self._lines():
            with suppress(ValueError):
                figures = json.loads(line)
                if isinstance(figures, dict) and figures.pop("weights", None) == mark:
                    found |= figures
        return found

    def _lines(self) -> list[str]:
        try:
            with self.path.open("rb") as file:
                return file.read(MAX_NBYTES).decode("utf-8", "replace").splitlines()
        except OSError:
            return []


def _mark(folder: Path) -> str:
    """Changes with any weight file's name, size or time."""
    text = str(folder.resolve()) + stamp_files(folder, find_shards(folder).paths)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
