"""Live states on disk, so that a closed conversation goes on without reading itself again.

One safetensors file a state: its exact ids, keys and values, recurrent and convolution states, checksums of
all, and the likeliest next ids as a fingerprint. Refuses what is damaged or of another model, template or
version.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .backend import mx
from .cache import Cache, DeltaState, KVBuffer, KVCache
from .engine import Engine
from .errors import DoesNotFit, StoreError, WeightsError
from .safetensors_file import read_header
from .shards import find_shards

FORMAT = "1"
# the fingerprint: so many of the likeliest next ids, whose logits must agree to float32 noise
LIKELIEST, TOLERANCE = 8, 1e-3
DISK_BUDGET = 8 << 30


class SavedStates:
    """The saved states of one engine in `folder`; together at most `budget_nbytes`, the oldest go first."""

    def __init__(self, folder: Path, engine: Engine, budget_nbytes: int = DISK_BUDGET):
        self.folder, self.engine, self.budget_nbytes = folder, engine, budget_nbytes

    def save(self, name: str, cache: Cache, ids: Sequence[int]) -> bool:
        """Write the state of `cache`, which has read `ids`, under `name`; False where it exceeds the budget.

        Raises DoesNotFit where the disk does not take it.
        """
        tensors = _tensors(cache, ids)
        if sum(t.nbytes for t in tensors.values()) > self.budget_nbytes:
            return False
        path = self._path(name)
        part = path.with_suffix(f".{os.getpid()}.part.safetensors")
        marks = {"identity": self._identity(), "fingerprint": json.dumps(self._fingerprint(cache))}
        marks |= {f"crc32 {key}": _checksum(tensor) for key, tensor in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            mx.save_safetensors(str(part), tensors, marks)
            part.replace(path)
        except (OSError, RuntimeError) as error:
            raise DoesNotFit(f"the state cannot be written to {path}: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        self._make_room(path)
        return True

    def load(self, name: str, *, quantized: bool = False) -> tuple[Cache, list[int]] | None:
        """The cache and ids that `save` was given under `name`; None where there is no such file.

        Raises StoreError, in one sentence, for a file that is not what this engine wrote.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            marks = read_header(path).metadata
            loaded = mx.load(str(path))
        except (WeightsError, RuntimeError) as error:
            raise StoreError(f"the saved state {path} is damaged: {error}") from error
        if not isinstance(loaded, dict) or marks.get("identity") != self._identity():
            raise StoreError(f"the saved state {path} belongs to another model, template or version")
        damaged = [key for key, tensor in loaded.items() if marks.get(f"crc32 {key}") != _checksum(tensor)]
        if damaged:
            raise StoreError(f"the saved state {path} is damaged: {damaged[0]} is not what was written")
        cache, ids = self._rebuilt(path, loaded, quantized)
        if not self._agrees(cache, marks.get("fingerprint", "")):
            raise StoreError(f"the saved state {path} predicts something else than when it was written")
        os.utime(path)
        return cache, ids

    def _rebuilt(self, path: Path, loaded: dict[str, mx.array], quantized: bool) -> tuple[Cache, list[int]]:
        try:
            ids = [int(token) for token in loaded["ids"]]
            cache = self.engine.model.new_cache(quantized=quantized)
            for i, layer in enumerate(cache.layers):
                if isinstance(layer, DeltaState):
                    layer.conv, layer.state = loaded[f"{i}.conv"], loaded[f"{i}.state"]
                else:
                    parts = [loaded[f"{i}.kv.{j}"] for j in range(6 if quantized else 2)]
                    layer.buffer, layer.length = KVBuffer(parts, len(ids)), len(ids)
            cache.length, cache.hidden = len(ids), loaded["hidden"]
        except KeyError as error:
            raise StoreError(
                f"the saved state {path} lacks {error}: it was written in another form"
            ) from error
        return cache, ids

    def _fingerprint(self, cache: Cache) -> list[tuple[int, float]]:
        if cache.hidden is None:
            raise ValueError("a cache that has read nothing has no state to save")
        logits = self.engine.model.logits(cache.hidden)[-1]
        best = mx.argsort(-logits)[:LIKELIEST]
        return [(int(token), float(logits[token])) for token in best]

    def _agrees(self, cache: Cache, written: str) -> bool:
        logits = self.engine.model.logits(cache.hidden)[-1] if cache.hidden is not None else None
        return logits is not None and all(
            abs(float(logits[token]) - value) <= TOLERANCE * (1 + abs(value))
            for token, value in json.loads(written or "[]")
        )

    def _identity(self) -> str:
        """Changes with the config, any weight file, the template, MLX and the activations' dtype."""
        engine = self.engine
        digest = hashlib.sha256(f"{FORMAT} {version('mlx')} {engine.model.policy.activations}".encode())
        digest.update(json.dumps(engine.config.raw, sort_keys=True).encode())
        digest.update(engine.template.source.encode())
        for shard in find_shards(engine.folder).paths:
            status = shard.stat()
            digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def _make_room(self, newest: Path) -> None:
        files = sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        total = sum(p.stat().st_size for p in files)
        for path in files:
            if total <= self.budget_nbytes or path == newest:
                return
            total -= path.stat().st_size
            path.unlink(missing_ok=True)


def _tensors(cache: Cache, ids: Sequence[int]) -> dict[str, mx.array]:
    """Everything that a cache holds, cut to its length, by name."""
    tensors = {"ids": mx.array(list(ids), mx.uint32)}
    if cache.hidden is not None:
        tensors["hidden"] = mx.contiguous(cache.hidden)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, KVCache):
            parts = layer.buffer.read(layer.length)
            tensors |= {f"{i}.kv.{j}": mx.contiguous(part) for j, part in enumerate(parts)}
        else:
            tensors |= {f"{i}.conv": layer.conv, f"{i}.state": layer.state}
    return tensors


def _checksum(tensor: mx.array) -> str:
    return str(zlib.crc32(memoryview(mx.view(mx.contiguous(tensor).flatten(), mx.uint8))))  # pyright: ignore[reportArgumentType]
