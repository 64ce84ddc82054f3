"""The header of a safetensors file, checked field by field before anything maps the data behind it.

Refuses headers that are cut, oversized or ambiguous, and tensors that overlap or leave the file.
Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeightsError

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
    """One tensor of a file: its bytes are `begin` to `end`, counted from the end of the header."""

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


def shown(name: str) -> str:
    """A name out of an untrusted file as a one-line message may hold it: printable and bounded."""
    short = name if len(name) <= 120 else name[:117] + "..."
    return short if short.isprintable() else repr(short)


def read_header(path: Path) -> Header:
    """Read and check the header of the regular file at `path`. Raises WeightsError naming file and tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            nbytes = _header_nbytes(path, file.read(8), size)
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
            f"{path} is no safetensors file: its header length is {nbytes}, wanted 2 to {MAX_HEADER_NBYTES}"
        )
    if 8 + nbytes > size:
        raise WeightsError(f"{path} is truncated: {size} bytes found, its header alone needs {8 + nbytes}")
    return nbytes


def parse_table(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a large table of tensors: no key twice, and a bound on what parsing may allocate.

    Raises WeightsError with one sentence that names `where`.
    """
    if sum(text.count(mark) for mark in b"[{,") > MAX_TABLE_VALUES:
        raise WeightsError(f"{where} holds more than {MAX_TABLE_VALUES} values")
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise WeightsError(f"{where} is nested too deeply") from error
    except ValueError as error:  # also JSONDecodeError and UnicodeDecodeError
        raise WeightsError(f"{where} is not valid JSON: {shown(str(error))}") from error
    if not isinstance(fields, dict):
        raise WeightsError(f"{where} is a JSON {type(fields).__name__}, wanted an object")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {shown(twice)} stands in it twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if value is None:  # MLX writes null where it was given nothing
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise WeightsError(f"__metadata__ of {path} is not an object of strings")
    return value


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 62 for number in value)


def _entry(path: Path, name: str, value: Any) -> Entry:
    def refuse(found: str) -> WeightsError:
        return WeightsError(f"{path}: the tensor {shown(name)} {found}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refuse("is described by something else than dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_NBYTES:
        raise refuse(f"has the dtype {shown(str(dtype))}, wanted one of {', '.join(ITEM_NBYTES)}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise refuse(f"has the shape {shown(str(shape))}, wanted at most {MAX_RANK} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"has the data_offsets {shown(str(offsets))}, wanted a begin and an end")
    wanted = math.prod(shape) * ITEM_NBYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise refuse(f"has {offsets[1] - offsets[0]} bytes, and {dtype} of shape {shape} needs {wanted}")
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _check_extents(path: Path, entries: dict[str, Entry], data_nbytes: int) -> None:
    """Every tensor lies within the `data_nbytes` behind the header, and no two share a byte."""
    last: Entry | None = None
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if last is not None and entry.begin < last.end:
            raise WeightsError(f"{path}: the tensors {shown(last.name)} and {shown(entry.name)} overlap")
        if entry.end > data_nbytes:
            raise WeightsError(
                f"{path} is truncated: it has {data_nbytes} bytes of data, and {shown(entry.name)} "
                f"ends at byte {entry.end}"
            )
        last = entry
