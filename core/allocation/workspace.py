"""The folder in which an unfinished measurement keeps hidden states, from which a stopped run resumes.

It lies beside the file that is being made: `.NAME.partial`. Stage n holds what enters layer n; a state is
written whole or not at all. Refuses a folder that no measurement made, and a second run in the same place.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.header import read_header
from ..errors import DoesNotFit, QchatError, UsageError
from ..machine.backend import mx
from ..machine.files import lock_folder, read_json, whole_file, write_whole

MARKER = "measurement.json"
KIND = "qchat sensitivity, unfinished"


class StateLost(QchatError):
    """A hidden state of an earlier run cannot be read."""


class Workspace:
    """A locked folder of the measurement with this `identity`; `complete` is the last stage that is whole."""

    def __init__(self, folder: Path, identity: str):
        self.folder, self.identity, self.complete = folder, identity, -1

    def prepare(self) -> None:
        """Keep the states of an earlier run of the same measurement; remove all others."""
        marker = _read_marker(self.folder)
        if marker is None and any(self.folder.iterdir()):
            raise UsageError(f"{self.folder} is in the way of the measurement: remove it first")
        if marker is not None and marker.get("identity") == self.identity:
            complete = marker.get("complete")
            self.complete = complete if isinstance(complete, int) else -1
        else:
            self.clear()

    def clear(self) -> None:
        """Begin anew, without any state."""
        self.complete = -1
        for path in self.folder.iterdir():
            if path.name != MARKER:
                shutil.rmtree(path)
        self._mark()

    def finish(self, stage: int) -> None:
        """Call `stage` complete, and remove what only earlier layers needed."""
        self.complete = stage
        self._mark()
        if stage:
            shutil.rmtree(self._stage(stage - 1), ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder, the marker last."""
        for path in self.folder.iterdir():
            if path.name != MARKER:
                shutil.rmtree(path)
        shutil.rmtree(self.folder)

    def begin(self, stage: int) -> None:
        self._stage(stage).mkdir(exist_ok=True)

    def has(self, stage: int, name: str) -> bool:
        return self._path(stage, name).is_file()

    def write(self, stage: int, name: str, state: mx.array) -> None:
        """Save the state [W, T, hidden] float32. Raises OSError."""
        with whole_file(self._path(stage, name)) as file:
            mx.save_safetensors(str(file), {"state": state.astype(mx.float32)})

    def read(self, stage: int, name: str) -> mx.array:
        """Load a state [W, T, hidden] float32. Raises StateLost."""
        path = self._path(stage, name)
        try:
            read_header(path)
            loaded = mx.load(str(path))
            state = loaded["state"] if isinstance(loaded, dict) else None
        except (QchatError, RuntimeError, KeyError) as error:
            raise StateLost(f"{path} cannot be read") from error
        if state is None:
            raise StateLost(f"{path} holds no state")
        mx.eval(state)
        return state

    def check_room(self, nbytes: int) -> None:
        """Raise DoesNotFit unless the disk has `nbytes` free."""
        free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            raise DoesNotFit(
                f"measuring needs {nbytes / 1e9:.2f} GB of disk in {self.folder.parent} and {free / 1e9:.2f} "
                "GB are free: free some, or choose another place with --sensitivity"
            )

    def _mark(self) -> None:
        fields = {"kind": KIND, "identity": self.identity, "complete": self.complete}
        write_whole(self.folder / MARKER, json.dumps(fields))

    def _stage(self, stage: int) -> Path:
        return self.folder / f"{stage:04}"

    def _path(self, stage: int, name: str) -> Path:
        return self._stage(stage) / f"{name}.safetensors"


@contextmanager
def open_workspace(output: Path, identity: str) -> Iterator[Workspace]:
    """Open the workspace of the file `output`, for this process alone.

    Raises UsageError for a place that cannot be written, or that another run uses.
    """
    folder = output.with_name(f".{output.name}.partial")
    lock = lock_folder(folder, f"another measurement is using {folder}: wait for it", UsageError)
    try:
        workspace = Workspace(folder, identity)
        workspace.prepare()
        yield workspace
    except OSError as error:
        where = error.filename or folder
        raise UsageError(f"the measurement cannot use {where}: {error.strerror}") from error
    finally:
        os.close(lock)


def _read_marker(folder: Path) -> dict | None:
    try:
        fields = read_json(folder / MARKER, UsageError)
    except UsageError:
        return None
    return fields if fields.get("kind") == KIND else None
