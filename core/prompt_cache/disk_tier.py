"""Snapshots on disk, so that what was read once is not read again after a restart.

A state is one safetensors file: the ids, keys and values that the state before it lacks, recurrent and conv
states, a checksum of each, and as a fingerprint the top logits of one more step. Its name is the digest of
the engine and of all ids up to its end. Refuses damaged files; never sees those of another model, template,
version or form.
"""

import hashlib
import json
import os
import time
import zlib
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..checkpoint.header import read_header
from ..engine.engine import Engine
from ..errors import DoesNotFit, StoreError, WeightsError
from ..machine.backend import mx
from ..machine.files import file_nbytes, read_json, whole_file, write_whole
from ..model.cache import Cache, DeltaState, KVBuffer, KVCache
from ..storage.state_files import NAME, STATE, claim, claimed, state_path

FORMAT = "3"
# the fingerprint: the likeliest ids after one more step with PROBE_ID; their logits must agree to rounding
PROBE_ID, PROBE_COUNT, TOLERANCE = 0, 8, 1e-3
DISK_BUDGET = 8 << 30
# what may be written in a day without being asked to: flash memory wears
DAILY_BUDGET = 32 << 30
DAY_SECONDS = 86_400
STALE_SECONDS = 3600.0  # a partial file this old was abandoned


@dataclass(frozen=True)
class _State:
    """What a state's header says: its `length` in tokens, the name of the state before it, if any, and
    whether it is of this engine and form."""

    length: int
    before: str
    ours: bool = True


class DiskTier:
    """The states of `engine` in `folder`, with keys and values at 8 bits if `quantized`.

    The least recently used are deleted beyond `budget_nbytes` in all, no state before those that follow it.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        budget_nbytes: int = DISK_BUDGET,
        *,
        quantized: bool = False,
        daily_nbytes: int = DAILY_BUDGET,
    ):
        self.folder, self.engine, self.quantized = folder, engine, quantized
        self.budget_nbytes, self.daily_nbytes = budget_nbytes, daily_nbytes
        self._written = folder.with_name(f"{folder.name}.written.json")
        self._known: dict[str, _State | None] = {}  # None for files that cannot be read

    # writing

    def save(self, cache: Cache, ids: Sequence[int], owner: str, *, unasked: bool = False) -> bool:
        """Save the state of `cache`, which has read `ids`, for the conversation `owner`.

        Returns False if it exceeds the budget, or, where it is saved `unasked`, that of the day. Raises
        DoesNotFit where the file cannot be written.
        """
        cache.give_back()  # what is read here must not be written meanwhile
        names = self._chain(ids)
        name = self._names(ids, [len(ids)])[len(ids)]
        if names[:1] != [name]:
            start = self._known_state(names[0]).length if names else 0
            tensors = _tensors(cache, ids, start)
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            before = sum(file_nbytes(state_path(self.folder, one)) for one in names)
            if before + nbytes > self.budget_nbytes or (unasked and not self._may_write(nbytes)):
                return False
            self._write(name, tensors, self._metadata(cache, tensors, names[0] if names else ""))
            self._known[name] = _State(len(ids), names[0] if names else "")
            names = [name, *names]
        self._claim(owner, names)
        self._make_room(keep=names)
        return True

    def _metadata(self, cache: Cache, tensors: dict[str, mx.array], before: str) -> dict[str, str]:
        return {
            "identity": self._identity(),
            "length": str(cache.length),
            "shift": str(cache.shift),
            "before": before,
            "fingerprint": json.dumps(self._fingerprint(cache)),
            **{f"crc32 {key}": _checksum(tensor) for key, tensor in tensors.items()},
        }

    def _write(self, name: str, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
        path = state_path(self.folder, name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with whole_file(path, mode=0o600) as file:
                mx.save_safetensors(str(file), tensors, metadata)
                self._count_written(file.stat().st_size)
        except (OSError, RuntimeError) as error:
            raise DoesNotFit(f"the state cannot be written to {path}: {error}") from error

    def _claim(self, owner: str, names: Iterable[str]) -> None:
        """Note that the states `names` serve `owner`, besides those that did and still exist."""
        names = dict.fromkeys(names)
        before = [name for name in claimed(self.folder, owner) if state_path(self.folder, name).exists()]
        try:
            claim(self.folder, owner, dict.fromkeys([*names, *before]))
        except OSError as error:
            raise DoesNotFit(f"the list of saved states cannot be written: {error}") from error

    def _may_write(self, nbytes: int) -> bool:
        return self._written_today() + nbytes <= self.daily_nbytes

    def _written_today(self) -> int:
        with suppress(StoreError):
            written = read_json(self._written, StoreError)
            if written.get("day") == _today() and isinstance(written.get("nbytes"), int):
                return written["nbytes"]
        return 0

    def _count_written(self, nbytes: int) -> None:
        total = {"day": _today(), "nbytes": self._written_today() + nbytes}
        write_whole(self._written, json.dumps(total), mode=0o600)

    # reading

    def find(self, ids: Sequence[int]) -> int:
        """Return the length of the longest prefix of `ids` that is saved; 0 if none is."""
        chain = self._chain(ids)
        return self._known_state(chain[0]).length if chain else 0

    def load(self, ids: Sequence[int], beyond: int = 0) -> Cache | None:
        """Load the state of the longest prefix of `ids`, if one longer than `beyond` is saved.

        Raises StoreError for a file that is damaged, and deletes it.
        """
        names = self._chain(ids)
        if not names or self._known_state(names[0]).length <= beyond:
            return None
        try:
            parts = [self._read(name) for name in reversed(names)]
            cache = self._build_cache(parts)
            metadata = read_header(state_path(self.folder, names[0])).metadata
            cache.shift_positions(int(metadata.get("shift", 0)))
            read = [token for part in parts for token in part["ids"].tolist()]  # pyright: ignore
            if read != list(ids[: len(read)]):
                raise StoreError(f"the saved state {names[0]} is damaged: it holds other ids")
            if not self._matches(cache, metadata):
                raise StoreError(f"the saved state {names[0]} predicts something else than when it was saved")
        except StoreError:
            self._forget(names[0])
            raise
        for name in names:
            with suppress(OSError):  # only the order of deletion depends on it
                os.utime(state_path(self.folder, name))
        return cache

    def _read(self, name: str) -> dict[str, mx.array]:
        """Return the tensors of a state; raises StoreError, and deletes the state, where it is damaged."""
        path = state_path(self.folder, name)
        try:
            metadata = read_header(path).metadata
            loaded = mx.load(str(path))
        except (WeightsError, RuntimeError) as error:
            self._forget(name)
            raise StoreError(f"the saved state {path} is damaged: {error}") from error
        if not isinstance(loaded, dict) or metadata.get("identity") != self._identity():
            self._forget(name)
            raise StoreError(f"the saved state {path} is damaged: it is another model's")
        damaged = [key for key, t in loaded.items() if metadata.get(f"crc32 {key}") != _checksum(t)]
        if damaged:
            self._forget(name)
            raise StoreError(f"the saved state {path} is damaged: the checksum of {damaged[0]} is wrong")
        return loaded

    def _forget(self, name: str) -> None:
        """Delete a state that cannot be used."""
        self._known[name] = None
        with suppress(OSError):
            state_path(self.folder, name).unlink(missing_ok=True)

    def _build_cache(self, parts: Sequence[dict[str, mx.array]]) -> Cache:
        """Build a cache from the states of a prefix, the shortest first."""
        last, length = parts[-1], sum(part["ids"].size for part in parts)
        cache = self.engine.model.new_cache(quantized=self.quantized)
        try:
            for i, layer in enumerate(cache.layers):
                if isinstance(layer, DeltaState):
                    layer.conv, layer.state = last[f"{i}.conv"], last[f"{i}.state"]
                    continue
                pieces = ([part[f"{i}.kv.{j}"] for part in parts] for j in range(6 if self.quantized else 2))
                kept = [mx.concatenate(piece, axis=2) for piece in pieces]
                mx.eval(kept)
                layer.buffer, layer.length = KVBuffer(kept, length), length
            cache.length, cache.hidden = length, last["hidden"]
        except KeyError as error:
            raise StoreError(f"a saved state is damaged: it lacks {error}") from error
        except ValueError as error:
            raise StoreError("a saved state is damaged: its arrays do not belong together") from error
        return cache

    # the folder

    @property
    def nbytes(self) -> int:
        """The bytes of all states in the folder."""
        return sum(map(file_nbytes, self.folder.glob(f"*{STATE}")))

    def _chain(self, ids: Sequence[int]) -> list[str]:
        """Return the names of the longest saved prefix of `ids` and of those before it, longest first."""
        self._refresh()
        ours = [state for state in self._known.values() if state and state.ours]
        lengths = {state.length for state in ours if state.length <= len(ids)}
        names = self._names(ids, lengths)
        for length in sorted(lengths, reverse=True):
            chain = self._states_before(names[length])
            if chain and self._known_state(chain[0]).length == length:
                return chain
        return []

    def _states_before(self, name: str) -> list[str]:
        """Return `name` and the names of the states before it; nothing if one of them is gone."""
        chain: list[str] = []
        while name:
            state = self._known.get(name)
            if state is None or not state.ours or name in chain:
                return []
            chain.append(name)
            name = state.before
        return chain

    def _known_state(self, name: str) -> _State:
        state = self._known.get(name)
        if state is None:
            raise StoreError(f"there is no saved state {name}")
        return state

    def _refresh(self) -> None:
        """Read the headers of states that other processes wrote, and forget those that were deleted."""
        found = {path.stem for path in self.folder.glob(f"*{STATE}") if NAME.fullmatch(path.stem)}
        self._known = {name: state for name, state in self._known.items() if name in found}
        for name in found - self._known.keys():
            self._known[name] = self._read_state(name)

    def _read_state(self, name: str) -> _State | None:
        with suppress(WeightsError, ValueError, KeyError):
            metadata = read_header(state_path(self.folder, name)).metadata
            ours = metadata.get("identity") == self._identity()
            return _State(int(metadata["length"]), metadata["before"], ours)
        return None

    def _make_room(self, keep: Sequence[str]) -> None:
        """Delete the least recently used states beyond the budget, and partial files of killed processes.

        Other processes may delete the same ones meanwhile.
        """
        found: dict[str, tuple[float, int]] = {}
        for path in self.folder.glob(f"*{STATE}"):
            with suppress(OSError):
                status = path.stat()
                if not path.name.startswith("."):
                    found[path.stem] = status.st_mtime, status.st_size
                elif time.time() - status.st_mtime > STALE_SECONDS:
                    path.unlink()
        while sum(nbytes for _, nbytes in found.values()) > self.budget_nbytes:
            followed = {state.before for name, state in self._known.items() if state and name in found}
            spare = found.keys() - followed - set(keep)
            if not spare:
                return
            oldest = min(spare, key=lambda name: found[name])
            del found[oldest]
            self._forget(oldest)

    # what a state is checked by

    def _fingerprint(self, cache: Cache) -> list[tuple[int, float]]:
        """Return the likeliest ids after one more step of `cache`, and their logits."""
        logits = self._probe_logits(cache)
        best = mx.argsort(-logits)[:PROBE_COUNT]
        return list(zip(best.tolist(), logits[best].tolist(), strict=True))  # pyright: ignore

    def _matches(self, cache: Cache, metadata: dict[str, str]) -> bool:
        """Whether one more step of `cache` gives the fingerprint in `metadata`."""
        logits = self._probe_logits(cache)
        try:
            ids, expected = zip(*json.loads(metadata.get("fingerprint", "")), strict=True)
            if any(not 0 <= token < logits.size for token in ids):  # MLX would read beyond the end
                return False
            return mx.allclose(logits[mx.array(ids)], mx.array(expected), TOLERANCE, TOLERANCE).item() is True
        except (ValueError, TypeError):  # a damaged header
            return False

    def _probe_logits(self, cache: Cache) -> mx.array:
        """Return the logits [V] after one more id; `cache` stays as it is."""
        probe = cache.copy()
        probe.own()
        self.engine.model.hidden([PROBE_ID], probe)
        if probe.hidden is None:
            raise ValueError("cannot compute logits from an empty cache")
        logits = self.engine.model.logits(probe.hidden)[-1]
        mx.eval(logits)
        return logits

    def _names(self, ids: Sequence[int], lengths: Iterable[int]) -> dict[int, str]:
        """Return the names of the states after the first n ids by n, for each n in `lengths`."""
        running, done, found = hashlib.blake2b(self._identity().encode(), digest_size=16), 0, {}
        for length in sorted(set(lengths)):
            running.update(array("I", ids[done:length]).tobytes())
            done = length
            found[length] = running.copy().hexdigest()
        return found

    def _identity(self) -> str:
        """Hash all that a state depends on: model, template, tokenizer, MLX's version, and what rounds it."""
        model, running = self.engine.identity, self.engine.model
        made_by = f"{FORMAT} {version('mlx')} {running.policy.activations} {running.delta_forms}"
        form = "8-bit" if self.quantized else "dense"
        parts = (made_by, form, model.config_hash, model.weights, model.template_hash, model.tokenizer_hash)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _today() -> int:
    return int(time.time() // DAY_SECONDS)


def _tensors(cache: Cache, ids: Sequence[int], start: int) -> dict[str, mx.array]:
    """Return the arrays of a cache by name: keys and values of the ids from `start` on, and all states."""
    tensors = {"ids": mx.array(list(ids[start:]), mx.uint32)}
    if cache.hidden is not None:
        tensors["hidden"] = mx.contiguous(cache.hidden)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, KVCache):
            parts = layer.buffer.read(layer.length)
            own = [mx.contiguous(part[:, :, start:]) for part in parts]
            mx.eval(own)  # one layer at a time
            tensors |= {f"{i}.kv.{j}": part for j, part in enumerate(own)}
        else:
            tensors |= {f"{i}.conv": layer.conv, f"{i}.state": layer.state}
    return tensors


def _checksum(tensor: mx.array) -> str:
    return str(zlib.crc32(memoryview(mx.view(mx.contiguous(tensor).flatten(), mx.uint8))))  # pyright: ignore[reportArgumentType]
