"""A cache of a checkpoint's final hidden states on disk, from which its head computes the exact logits.

They take at most a twentieth of the space of float16 logits. Each sequence of ids has one file, named after
the ids, with a checksum; a damaged file counts as missing. The least recently used caches are deleted.
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
from ..machine.backend import choose_policy, mx
from ..machine.files import MAX_JSON_NBYTES, cache_path, read_bytes, whole_file

FORMAT = 1
LIMIT_NBYTES = 8 << 30


@dataclass(frozen=True)
class HiddenCache:
    """Hidden states [T, width] of one checkpoint by their ids [T]."""

    folder: Path
    width: int

    @classmethod
    def open(cls, model: Path, config: ModelConfig) -> "HiddenCache":
        """Open the cache of the checkpoint in `model`, as this machine computes it.

        Raises QchatError where the cache folder cannot be made, WeightsError for the checkpoint.
        """
        folder = cache_folder() / _identity(model)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.utime(folder)  # records the last use
        except OSError as error:
            raise QchatError(f"the cache folder {folder} cannot be made: {error.strerror}") from error
        return cls(folder, config.hidden_size)

    def read(self, ids: Sequence[int]) -> mx.array | None:
        """Return the hidden states that `write` saved for `ids`; None if the file is missing or damaged."""
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
        """Save `hidden` [T, width] for `ids` [T]. Raises DoesNotFit where the file cannot be written."""
        path = self._path(ids)
        try:
            with whole_file(path) as file:
                mx.save_safetensors(str(file), {"hidden": hidden}, {"crc32": _checksum(hidden)})
        except (OSError, RuntimeError) as error:
            raise DoesNotFit(f"{path} cannot be written: {error}") from error

    def check_room(self, tokens: int) -> None:
        """Raise DoesNotFit unless the disk has space for the states of `tokens` tokens in float32."""
        needed, free = 4 * tokens * self.width, shutil.disk_usage(self.folder).free
        if needed > free:
            raise DoesNotFit(
                f"the reference's hidden states for {tokens:,} tokens take {needed / 1e9:.1f} GB in "
                f"{self.folder}, where {free / 1e9:.1f} GB are free: choose a shorter text, or another "
                "folder with XDG_CACHE_HOME"
            )

    def delete_oldest(self, limit_nbytes: int = LIMIT_NBYTES) -> None:
        """Delete the least recently used caches of other checkpoints until all together fit in the limit.

        Other processes may delete the same ones meanwhile.
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
    """Return the folder of all caches, which may not exist. Raises QchatError without a home folder."""
    folder = cache_path("eval")
    if folder is None:
        raise QchatError("there is no home folder for the cache: set XDG_CACHE_HOME")
    return folder


def _identity(model: Path) -> str:
    """Hash all that hidden states depend on: config, weight files, MLX's version, the activations' dtype."""
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
        with suppress(OSError):  # another process may have deleted it
            total += file.stat().st_size
    return total
