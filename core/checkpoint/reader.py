"""Reads stored tensors: lazily, for a model to run, or a few rows at a time, for a conversion.

Each reader opens a weight file once, when it first needs it.
"""

import sys
import weakref
from io import BufferedReader
from pathlib import Path

from ..errors import WeightsError
from ..machine.backend import mx
from ..quoting import printable
from .stored import Stored

# for each stored dtype the format of its buffer and the dtype of its array
FORMATS = {
    "BF16": ("H", mx.bfloat16),
    "F16": ("H", mx.float16),
    "F32": ("f", mx.float32),
    "U32": ("I", mx.uint32),
    "U8": ("B", mx.uint8),
    "F8_E4M3": ("B", mx.uint8),
}


class LazyReader:
    """Tensors that MLX reads when something evaluates them."""

    def __init__(self) -> None:
        self._files: dict[Path, dict[str, mx.array]] = {}

    def read(self, stored: Stored) -> mx.array:
        """The whole tensor. Raises WeightsError for a file that MLX cannot open."""
        if stored.path not in self._files:
            self._files[stored.path] = _load(stored.path)
        return self._files[stored.path][stored.entry.name]


def _load(path: Path) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"MLX cannot open {path}: {printable(str(error))}") from error
    return dict(arrays) if isinstance(arrays, dict) else {}


class SliceReader:
    """Reads tensors, or rows of them, into memory at once and keeps none. Its files close with it."""

    def __init__(self) -> None:
        self._files: dict[Path, BufferedReader] = {}

    def read(self, stored: Stored) -> mx.array:
        """The tensor in its dtype, F8_E4M3 as uint8. Raises WeightsError."""
        entry = stored.entry
        if entry.dtype not in FORMATS or sys.byteorder != "little":
            raise stored.refuse(f"has the dtype {entry.dtype}, which this machine cannot read in slices")
        data = bytearray(entry.end - entry.begin)
        try:
            file = self._file(stored.path)
            file.seek(stored.header.data_begin + entry.begin)
            count = file.readinto(data)
        except OSError as error:
            raise stored.refuse(f"cannot be read: {error.strerror}") from error
        if count != len(data):
            raise stored.refuse("was truncated while it was being read")
        code, dtype = FORMATS[entry.dtype]
        values = mx.array(memoryview(data).cast(code))  # pyright: ignore  # MLX takes buffers, its type stubs do not say so
        return values.view(dtype).reshape(entry.shape)

    def _file(self, path: Path) -> BufferedReader:
        if path not in self._files:
            file = self._files[path] = path.open("rb")
            weakref.finalize(self, file.close)
        return self._files[path]
