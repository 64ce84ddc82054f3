"""The final hidden states of a checkpoint, on disk: from them its head makes the exact logits again.

They take a twentieth of the room of float16 logits, or less. One file per run of ids, named by them, with a
checksum; a file that is not what was written counts as missing. What was used longest ago is deleted.
"""

import hashlib
import os
import shutil
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..checkpoint.config import ModelConfig
from ..checkpoint.header import read_header
from ..checkpoint.shards import find_shards, read_headers, stamp_files
from ..errors import DoesNotFit, QchatError, WeightsError
from ..machine.backend import cache_path, choose_policy, mx
from ..machine.files import MAX_JSON_NBYTES, read_bytes, whole_file

FORMAT = 1
LIMIT_NBYTES = 8 << 30


@dataclass(frozen=True)
class HiddenCache:
    """Hidden states [T, width] of one checkpoint by the ids [T] they belong to."""

    folder: Path
    width: int

    @classmethod
    def open(cls, model: Path, config: ModelConfig) -> "HiddenCache":
        """The cache of what the checkpoint in `model` computes on this machine.

        Raises QchatError where there can be no cache folder, and WeightsError.
        """
        folder = cache_folder() / _identity(model)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.utime(folder)  # the mark of its last use
        except OSError as error:
            raise QchatError(f"the cache folder {folder} cannot be made: {error.strerror}") from error
        return cls(folder, config.hidden_size)

    def read(self, ids: Sequence[int]) -> mx.array | None:
        """What `write` was given with these ids; None for a file that is missing or damaged."""
        path = self._path(ids)
        try:
            checksum = read_header(path).metadata.get("crc32")
            loaded = mx.load(str(path))
            hidden = loaded["hidden"] if isinstance(loaded, dict) else mx.array(0)
            if hidden.shape != (len(ids), self.width) or _checksum(hidden) != checksum:
                return None
        except (WeightsError, RuntimeError, KeyError):
            return None
        return hidden

    def write(self, ids: Sequence[int], hidden: mx.array) -> None:
        """Keep `hidden` [T, width]. Raises DoesNotFit where the file cannot be written."""
        path = self._path(ids)
        try:
            with whole_file(path) as file:
                mx.save_safetensors(str(file), {"hidden": hidden}, {"crc32": _checksum(hidden)})
        except (OSError, RuntimeError) as error:
            raise DoesNotFit(f"{path} cannot be written: {error}") from error

    def check_room(self, tokens: int) -> None:
        """Raises DoesNotFit unless the disk has room for the states of so many tokens in float32."""
        needed, free = 4 * tokens * self.width, shutil.disk_usage(self.folder).free
        if needed > free:
            raise DoesNotFit(
                f"what the reference computes for {tokens:,} tokens takes {needed / 1e9:.1f} GB in "
                f"{self.folder}, where {free / 1e9:.1f} GB are free: take a shorter text, or another place "
                "with XDG_CACHE_HOME"
            )

    def forget_others(self, limit_nbytes: int = LIMIT_NBYTES) -> None:
        """Delete what was used longest ago of other checkpoints, until all together is within the limit.

        Other processes may be deleting the same.
        """
        others: list[tuple[float, int, Path]] = []
        for path in set(self.folder.parent.iterdir()) - {self.folder}:
            with suppress(OSError):
                others.append((path.stat().st_mtime, _nbytes(path), path))
        total = _nbytes(self.folder) + sum(nbytes for _, nbytes, _ in others)
        for _, nbytes, path in sorted(others):
            if total <= limit_nbytes:
                return
            shutil.rmtree(path, ignore_errors=True)
            total -= nbytes

    def _path(self, ids: Sequence[int]) -> Path:
        return self.folder / f"{hashlib.sha256(array('I', ids).tobytes()).hexdigest()[:32]}.safetensors"


def cache_folder() -> Path:
    """Where reference states are kept; it may not exist. Raises QchatError where there is no home folder."""
    folder = cache_path("eval")
    if folder is None:
        raise QchatError("there is no home folder for the cache: set XDG_CACHE_HOME")
    return folder


def _identity(model: Path) -> str:
    """A name that changes with the config, with any weight file, with MLX and with the activations' dtype."""
    digest = hashlib.sha256(f"{FORMAT} {version('mlx')} {choose_policy(0).activations}".encode())
    digest.update(read_bytes(model / "config.json", WeightsError, MAX_JSON_NBYTES))
    shards = find_shards(model)
    digest.update(stamp_files(model, shards.files).encode())
    for header in read_headers(shards):
        digest.update(repr(header.entries).encode())
    return digest.hexdigest()[:32]


def _checksum(hidden: mx.array) -> str:
    return str(zlib.crc32(memoryview(mx.view(hidden, mx.uint8))))  # pyright: ignore[reportArgumentType]


def _nbytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # it may be gone by now
            total += file.stat().st_size
    return total
