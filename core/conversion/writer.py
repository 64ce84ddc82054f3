"""Writes safetensors shards as streams: sizes are known in advance, so no shard is ever in memory.

Owns the names, dtypes and places of the written tensors. A file gets its name once it is safely on disk.
Format: 8 bytes of header length, JSON, then the tensors; shards of at most 5 GiB in name order, always with
an index.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..checkpoint.header import ITEM_NBYTES
from ..checkpoint.layouts import MTP_PREFIX, Spec
from ..checkpoint.packed import Geometry
from ..checkpoint.shards import INDEX_NAME, MTP_NAMES
from ..machine.backend import mx
from ..machine.files import write_whole

SHARD_NBYTES = 5 << 30
MTP_FILE = MTP_NAMES[0]
UNFINISHED = ".part"
METADATA = {"format": "mlx"}
MLX_DTYPES = {"BF16": mx.bfloat16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}
ALIGNMENT = 8


@dataclass(frozen=True)
class Array:
    """One tensor to write: its stored name, its dtype as safetensors names it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_NBYTES[self.dtype]


@dataclass(frozen=True)
class Unit:
    """One module to write; its arrays by part (`weight`, `scales`, `biases`) are in the same shard."""

    name: str
    path: str
    geometry: Geometry | None
    arrays: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class Shard:
    """A file to write, with its units in name order."""

    file: str
    units: tuple[Unit, ...]

    @property
    def arrays(self) -> list[Array]:
        return [array for unit in self.units for array in unit.arrays.values()]

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        return len(_header(self.arrays)) + sum(unit.nbytes for unit in self.units)


def make_unit(name: str, spec: Spec, geometry: Geometry | None, *, bare_mtp: bool) -> Unit:
    """The canonical tensor `name` in the converted layout; `bare_mtp` leaves `mtp.` without a prefix."""
    path = _stored_path(name, bare_mtp)
    if geometry is not None:
        return Unit(name, path, geometry, _packed_arrays(path, spec.shape, geometry))
    if spec.kind == "vector":  # A_log and dt_bias, whose names end there
        return Unit(name, path, None, {"weight": Array(path, "F32", spec.shape)})
    shape = (*spec.shape, 1) if spec.kind == "conv" else spec.shape
    return Unit(name, path, None, {"weight": Array(f"{path}.weight", "BF16", shape)})


def _stored_path(name: str, bare_mtp: bool) -> str:
    if name.startswith(MTP_PREFIX):
        return name if bare_mtp else f"language_model.{name}"
    return f"language_model.{name}" if name == "lm_head" else f"language_model.model.{name}"


def _packed_arrays(path: str, shape: Sequence[int], geometry: Geometry) -> dict[str, Array]:
    *rows, width = shape
    groups = (*rows, width // geometry.group_size)
    words = Array(f"{path}.weight", "U32", (*rows, width * geometry.bits // 32))
    if geometry.mode != "affine":
        return {"scales": Array(f"{path}.scales", "U8", groups), "weight": words}
    factors = {part: Array(f"{path}.{part}", "BF16", groups) for part in ("biases", "scales")}
    return {**factors, "weight": words}


def split_shards(units: Iterable[Unit], limit: int) -> list[Shard]:
    """Fill shards with units in name order up to `limit` bytes of tensors, at least one unit each."""
    parts: list[list[Unit]] = [[]]
    filled = 0
    for unit in sorted(units, key=lambda unit: unit.path):
        if parts[-1] and filled + unit.nbytes > limit:
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += unit.nbytes
    names = (f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1))
    return [Shard(name, tuple(part)) for name, part in zip(names, parts, strict=True)]


class ShardWriter:
    """An open shard that takes rows in any order; leaving the block gives the file its name.

    Raises OSError. After an error, nothing of the file is left.
    """

    def __init__(self, folder: Path, shard: Shard):
        self._final = folder / shard.file
        # a fixed name, not `whole_file`: the folder is locked, and a rerun removes what ends in this
        self._partial = folder / f"{shard.file}{UNFINISHED}"
        header = _header(shard.arrays)
        self._places: dict[str, int] = {}
        at = len(header)
        for array in shard.arrays:
            self._places[array.name] = at
            at += array.nbytes
        self._file = self._partial.open("wb")
        self._file.write(header)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: object, _t: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._partial.rename(self._final)
        finally:
            self._discard()

    def write(self, array: Array, values: mx.array, row: int = 0) -> None:
        """Write `values`, in the dtype of `array`, from its `row`-th entry along the first axis on."""
        data = memoryview(mx.contiguous(values).view(mx.uint8))  # pyright: ignore[reportArgumentType]
        self._file.seek(self._places[array.name] + row * (array.nbytes // array.shape[0]))
        self._file.write(data)

    def _discard(self) -> None:
        """Remove the unfinished file; closing flushes it, which fails again on a full disk."""
        try:
            self._file.close()
        finally:
            self._partial.unlink(missing_ok=True)


def _header(arrays: Sequence[Array]) -> bytes:
    """The header behind its length, padded so that the tensors begin at a multiple of 8."""
    fields: dict[str, Any] = {"__metadata__": METADATA}
    at = 0
    for array in arrays:
        offsets = [at, at + array.nbytes]
        fields[array.name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index of all shards, without a separate file of the MTP head."""
    listed = [shard for shard in shards if shard.file != MTP_FILE]
    total = sum(unit.nbytes for shard in listed for unit in shard.units)
    places = {array.name: shard.file for shard in listed for array in shard.arrays}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_file(folder / INDEX_NAME, json.dumps(index, indent=2).encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all, through a name that a rerun removes. Raises OSError."""
    write_whole(path, data, sync=True, suffix=UNFINISHED)
