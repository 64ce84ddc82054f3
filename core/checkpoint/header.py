"""The header of a safetensors file, checked field by field before anything maps the tensors' data.

Refuses headers that are truncated, oversized or ambiguous, and tensors that overlap or exceed the file.
Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes.
"""

import codecs
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..machine.files import LFS_POINTER, refuse_lfs_pointer
from ..quoting import printable, quote_value

ITEM_NBYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}  # the dtypes that mx.load reads
MAX_HEADER_NBYTES = 50_000_000  # the largest published header (397B, one entry per expert) is under 15 MB
MAX_TABLE_VALUES = 5_000_000  # parsing nothing but brackets and commas would cost 20 times their size
MAX_RANK = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; its bytes are `begin` to `end`, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors of the safetensors file at `path`, by stored name; their bytes begin at `data_begin`."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_begin: int


def read_header(path: Path) -> Header:
    """Read and check the header of the regular file at `path`. Raises WeightsError naming file and tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            beginning = file.read(len(LFS_POINTER))
            refuse_lfs_pointer(path, beginning, WeightsError)
            nbytes = _header_nbytes(path, beginning[:8], size)
            file.seek(8)
            text = file.read(nbytes)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    fields = parse_table(text, f"the header of {path}")
    metadata = _metadata(path, fields.pop("__metadata__", None))
    entries = {name: _entry(path, name, value) for name, value in fields.items()}
    _check_extents(path, entries, size - 8 - nbytes)
    return Header(path, entries, metadata, 8 + nbytes)


def _header_nbytes(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise WeightsError(f"{path} is truncated: {size} bytes found, and a safetensors file has at least 8")
    nbytes = int.from_bytes(prefix, "little")
    if nbytes < 2 or nbytes > MAX_HEADER_NBYTES:
        raise WeightsError(
            f"{path} is not a safetensors file: its header length is {nbytes}, "
            f"wanted 2 to {MAX_HEADER_NBYTES}"
        )
    if 8 + nbytes > size:
        raise WeightsError(f"{path} is truncated: {size} bytes found, its header alone needs {8 + nbytes}")
    return nbytes


def parse_table(text: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object of a large table of tensors, with a bound on what parsing may allocate.

    Raises WeightsError naming `where`, also for a key that occurs twice.
    """
    if sum(text.count(mark) for mark in b"[{,") > MAX_TABLE_VALUES:
        raise WeightsError(f"{where} holds more than {MAX_TABLE_VALUES} values")
    try:
        decoded = text.removeprefix(codecs.BOM_UTF8).decode()
        fields = json.loads(decoded, object_pairs_hook=_unique_fields, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise WeightsError(f"{where} is nested too deeply") from error
    except ValueError as error:  # also JSONDecodeError and UnicodeDecodeError
        raise WeightsError(f"{where} is not valid JSON: {printable(str(error))}") from error
    if not isinstance(fields, dict):
        raise WeightsError(f"{where} is a JSON {type(fields).__name__}, wanted an object")
    return fields


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {printable(twice)} occurs twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if value is None:  # MLX writes null when it is given no metadata
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise WeightsError(f"__metadata__ of {path} is not an object of strings")
    return value


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 62 for number in value)


def _entry(path: Path, name: str, value: Any) -> Entry:
    def refuse(found: str) -> WeightsError:
        return WeightsError(f"{path}: the tensor {printable(name)} {found}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refuse("must be described by dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_NBYTES:
        found = printable(dtype) if isinstance(dtype, str) else quote_value(dtype)
        raise refuse(f"has the dtype {found}, wanted one of {', '.join(ITEM_NBYTES)}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise refuse(f"has the shape {quote_value(shape)}, wanted at most {MAX_RANK} integers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"has the data_offsets {quote_value(offsets)}, wanted a begin and an end")
    wanted = math.prod(shape) * ITEM_NBYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise refuse(f"has {offsets[1] - offsets[0]} bytes, and {dtype} of shape {shape} needs {wanted}")
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _check_extents(path: Path, entries: dict[str, Entry], data_nbytes: int) -> None:
    """Check that every tensor lies within the `data_nbytes` after the header and that none overlap."""
    last: Entry | None = None
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if last is not None and entry.begin < last.end:
            raise WeightsError(
                f"{path}: the tensors {printable(last.name)} and {printable(entry.name)} overlap"
            )
        if entry.end > data_nbytes:
            raise WeightsError(
                f"{path} is truncated: it has {data_nbytes} bytes of data, and {printable(entry.name)} "
                f"ends at byte {entry.end}"
            )
        last = entry
