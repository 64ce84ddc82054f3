"""Live states on disk, so that a closed conversation goes on without reading itself again.

One safetensors file a state: its exact ids, keys and values, recurrent and convolution states, checksums of
all, and as a fingerprint what one more step predicts. Refuses what is damaged or of another model, template,
version or form.
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
# the fingerprint: so many of the likeliest ids after one more, whose logits must agree to float32 noise
PROBE, LIKELIEST, TOLERANCE = 0, 8, 1e-3
DISK_BUDGET = 8 << 30
STALE_SECONDS = 3600.0  # nobody writes one state for so long


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
        quantized = any(layer.quantized for layer in cache.layers if isinstance(layer, KVCache))
        fingerprint = self._fingerprint(self._rebuilt(tensors, quantized))
        marks = {
            "identity": self._identity(),
            "form": _form(quantized),
            "fingerprint": json.dumps(fingerprint),
            **{f"crc32 {key}": _checksum(tensor) for key, tensor in tensors.items()},
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with whole_file(path, mode=0o600) as file:
                mx.save_safetensors(str(file), tensors, marks)
        except (OSError, RuntimeError) as error:
            raise DoesNotFit(f"the state cannot be written to {path}: {error}") from error
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
        if marks.get("form") != _form(quantized):
            raise StoreError(f"the saved state {path} is {marks.get('form')}, wanted {_form(quantized)}")
        damaged = [key for key, tensor in loaded.items() if marks.get(f"crc32 {key}") != _checksum(tensor)]
        if damaged:
            raise StoreError(f"the saved state {path} is damaged: {damaged[0]} is not what was written")
        try:
            probe, cache = self._rebuilt(loaded, quantized), self._rebuilt(loaded, quantized)
        except KeyError as error:
            raise StoreError(f"the saved state {path} is damaged: it lacks {error}") from error
        if not self._agrees(probe, marks.get("fingerprint", "")):
            raise StoreError(f"the saved state {path} predicts something else than when it was written")
        with suppress(OSError):  # only decides which goes first when the budget is spent
            os.utime(path)
        return cache, loaded["ids"].tolist()  # pyright: ignore[reportReturnType]

    def _rebuilt(self, tensors: Mapping[str, mx.array], quantized: bool) -> Cache:
        """A cache of the arrays that `_tensors` gave; raises KeyError for one that is missing."""
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
        """The likeliest ids after one more step from `probe`, which that uses up, and their logits."""
        logits = self._step(probe)
        best = mx.argsort(-logits)[:LIKELIEST]
        return list(zip(best.tolist(), logits[best].tolist(), strict=True))  # pyright: ignore

    def _agrees(self, probe: Cache, written: str) -> bool:
        logits = self._step(probe)
        try:
            ids, expected = zip(*json.loads(written), strict=True)
            if any(not 0 <= token < logits.size for token in ids):  # MLX would read beyond the end
                return False
            return mx.allclose(logits[mx.array(ids)], mx.array(expected), TOLERANCE, TOLERANCE).item() is True
        except (ValueError, TypeError):  # a damaged header
            return False

    def _step(self, probe: Cache) -> mx.array:
        self.engine.model.hidden([PROBE], probe)
        if probe.hidden is None:
            raise ValueError("a cache that has read nothing predicts nothing")
        return self.engine.model.logits(probe.hidden)[-1]

    def _identity(self) -> str:
        """Changes with the model, the template, the tokenizer, MLX and the activations' dtype."""
        made_by = f"{FORMAT} {version('mlx')} {self.engine.model.policy.activations}"
        model = self.engine.identity
        parts = (made_by, model.config_hash, model.weights, model.template_hash, model.tokenizer_hash)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _make_room(self, newest: Path) -> None:
        """Delete what was used longest ago beyond the budget, and what processes that were killed left half
        written. Other processes may be deleting the same."""
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


def _form(quantized: bool) -> str:
    return "8-bit" if quantized else "dense"


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
