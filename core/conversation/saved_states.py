"""Live states on disk, so that a reopened conversation continues without a new prefill.

Each state is one safetensors file: exact ids, keys and values, recurrent and conv states, a checksum of each,
and as a fingerprint the top logits of one more step. Refuses damaged files, and states of another model,
template, version or cache format.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from ..checkpoint.header import read_header
from ..engine.engine import Engine
from ..errors import DoesNotFit, StoreError, WeightsError
from ..machine.backend import mx
from ..machine.files import whole_file
from ..model.cache import Cache, DeltaState, KVBuffer, KVCache

FORMAT = "2"
# the fingerprint: the likeliest ids after one more step with PROBE_ID; their logits must agree to rounding
PROBE_ID, PROBE_COUNT, TOLERANCE = 0, 8, 1e-3
DISK_BUDGET = 8 << 30
STALE_SECONDS = 3600.0  # a partial file this old was abandoned


class ForeignState(StoreError):
    """A saved state that another model, template or version of MLX wrote: whole, and of no use here."""


class SavedStates:
    """The saved states in `folder`, of `engine`; the oldest are deleted beyond `budget_nbytes` in all."""

    def __init__(self, folder: Path, engine: Engine, budget_nbytes: int = DISK_BUDGET):
        self.folder, self.engine, self.budget_nbytes = folder, engine, budget_nbytes

    def save(self, name: str, cache: Cache, ids: Sequence[int]) -> bool:
        """Save the state of `cache`, which has read `ids`, as `name`; returns False if it exceeds the budget.

        Raises DoesNotFit where the file cannot be written.
        """
        tensors = _tensors(cache, ids)
        if sum(t.nbytes for t in tensors.values()) > self.budget_nbytes:
            return False
        path = self._path(name)
        quantized = any(layer.quantized for layer in cache.layers if isinstance(layer, KVCache))
        fingerprint = self._fingerprint(self._build_cache(tensors, quantized))
        metadata = {
            "identity": self._identity(),
            "form": _cache_format(quantized),
            "fingerprint": json.dumps(fingerprint),
            **{f"crc32 {key}": _checksum(tensor) for key, tensor in tensors.items()},
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with whole_file(path, mode=0o600) as file:
                mx.save_safetensors(str(file), tensors, metadata)
        except (OSError, RuntimeError) as error:
            raise DoesNotFit(f"the state cannot be written to {path}: {error}") from error
        self._make_room(path)
        return True

    def load(self, name: str, *, quantized: bool = False) -> tuple[Cache, list[int]] | None:
        """Load the cache and ids saved under `name`; returns None where there is no such file.

        Raises ForeignState for the file of another engine, StoreError for a damaged one.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            metadata = read_header(path).metadata
            loaded = mx.load(str(path))
        except (WeightsError, RuntimeError) as error:
            raise StoreError(f"the saved state {path} is damaged: {error}") from error
        if not isinstance(loaded, dict) or metadata.get("identity") != self._identity():
            raise ForeignState(f"the saved state {path} belongs to another model, template or version")
        if metadata.get("form") != _cache_format(quantized):
            wanted = _cache_format(quantized)
            raise StoreError(f"the saved state {path} is {metadata.get('form')}, wanted {wanted}")
        damaged = [key for key, t in loaded.items() if metadata.get(f"crc32 {key}") != _checksum(t)]
        if damaged:
            raise StoreError(f"the saved state {path} is damaged: the checksum of {damaged[0]} is wrong")
        try:
            probe, cache = self._build_cache(loaded, quantized), self._build_cache(loaded, quantized)
        except KeyError as error:
            raise StoreError(f"the saved state {path} is damaged: it lacks {error}") from error
        if not self._matches(probe, metadata.get("fingerprint", "")):
            raise StoreError(f"the saved state {path} predicts something else than when it was saved")
        with suppress(OSError):  # only the order of deletion depends on it
            os.utime(path)
        return cache, loaded["ids"].tolist()  # pyright: ignore[reportReturnType]

    def _build_cache(self, tensors: Mapping[str, mx.array], quantized: bool) -> Cache:
        """Build a cache from the arrays of `_tensors`. Raises KeyError for a missing one."""
        length = tensors["ids"].size
        cache = self.engine.model.new_cache(quantized=quantized)
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, DeltaState):
                layer.conv, layer.state = tensors[f"{i}.conv"], tensors[f"{i}.state"]
            else:
                parts = [tensors[f"{i}.kv.{j}"] for j in range(6 if quantized else 2)]
                layer.buffer, layer.length = KVBuffer(parts, length), length
        cache.length, cache.hidden = length, tensors["hidden"]
        return cache

    def _fingerprint(self, probe: Cache) -> list[tuple[int, float]]:
        """Return the likeliest ids after one more step of `probe`, and their logits; `probe` advances."""
        logits = self._probe_logits(probe)
        best = mx.argsort(-logits)[:PROBE_COUNT]
        return list(zip(best.tolist(), logits[best].tolist(), strict=True))  # pyright: ignore

    def _matches(self, probe: Cache, fingerprint: str) -> bool:
        """Whether one more step of `probe` gives the saved `fingerprint`; `probe` advances."""
        logits = self._probe_logits(probe)
        try:
            ids, expected = zip(*json.loads(fingerprint), strict=True)
            if any(not 0 <= token < logits.size for token in ids):  # MLX would read beyond the end
                return False
            return mx.allclose(logits[mx.array(ids)], mx.array(expected), TOLERANCE, TOLERANCE).item() is True
        except (ValueError, TypeError):  # a damaged header
            return False

    def _probe_logits(self, probe: Cache) -> mx.array:
        """Read one more id into `probe`; returns the logits [V] after it."""
        self.engine.model.hidden([PROBE_ID], probe)
        if probe.hidden is None:
            raise ValueError("cannot compute logits from an empty cache")
        return self.engine.model.logits(probe.hidden)[-1]

    def _identity(self) -> str:
        """Hash all that a state depends on: model, template, tokenizer, MLX's version, and what rounds it."""
        model, running = self.engine.identity, self.engine.model
        made_by = f"{FORMAT} {version('mlx')} {running.policy.activations} {running.delta_forms}"
        parts = (made_by, model.config_hash, model.weights, model.template_hash, model.tokenizer_hash)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _make_room(self, newest: Path) -> None:
        """Delete the least recently used states beyond the budget, and partial files of killed processes.

        Other processes may delete the same ones meanwhile.
        """
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):
                status = path.stat()
                if not path.name.startswith("."):
                    found.append((status.st_mtime, status.st_size, path))
                elif time.time() - status.st_mtime > STALE_SECONDS:
                    path.unlink()
        total = sum(nbytes for _, nbytes, _ in found)
        for _, nbytes, path in sorted(found):
            if total <= self.budget_nbytes or path == newest:
                return
            total -= nbytes
            with suppress(OSError):
                path.unlink()


def _cache_format(quantized: bool) -> str:
    return "8-bit" if quantized else "dense"


def _tensors(cache: Cache, ids: Sequence[int]) -> dict[str, mx.array]:
    """Return the arrays of a cache by name, trimmed to its length."""
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
