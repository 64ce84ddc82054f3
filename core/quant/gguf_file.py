"""Reads the directory of a GGUF version 3 file and writes such files, with metadata and float32 tensors only.

Keeps only numbers, texts and lists of texts of the metadata. Refuses, before allocating anything, sizes that
exceed the file and ambiguous entries. Format: ggml's docs/gguf.md.
"""

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from ..errors import ModelError, UsageError
from ..machine.backend import mx
from ..machine.files import whole_file
from ..quoting import printable, quote_value

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
FLOAT32 = 0  # ggml's number for the type
TEXT, LIST, UINT32 = 8, 9, 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_ENTRIES = 200_000  # of metadata, of a list of texts, of tensors; a 397B model's imatrix has under 2,000
MAX_TEXT_NBYTES = 1 << 16
MAX_RANK = 4

Value = int | float | str | list[str]


@dataclass(frozen=True)
class TensorSpan:
    """A float32 tensor at byte `offset` of a file; `shape` has the fastest axis last."""

    offset: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class Directory:
    """The contents of a GGUF file; `others` names the tensors that are not float32."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorSpan]
    others: tuple[str, ...]


class Cursor:
    """Reads little-endian numbers and texts from an open binary file of known size. Raises ModelError."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file = file
        self.path = path
        self.size = os.fstat(file.fileno()).st_size

    def refuse(self, found: str) -> NoReturn:
        raise ModelError(f"cannot read {self.path}: {found}")

    def take(self, nbytes: int) -> bytes:
        data = self.file.read(nbytes) if nbytes <= self.left else b""
        if len(data) != nbytes:
            self.refuse(
                f"it is truncated: {nbytes:,} bytes wanted at byte {self.file.tell():,} of {self.size:,}"
            )
        return data

    def skip(self, nbytes: int) -> None:
        if nbytes > self.left:
            self.refuse(
                f"it is truncated: {nbytes:,} bytes wanted at byte {self.file.tell():,} of {self.size:,}"
            )
        self.file.seek(nbytes, os.SEEK_CUR)

    @property
    def left(self) -> int:
        return self.size - self.file.tell()

    def number(self, code: str) -> int | float:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, code: str, what: str, limit: int = MAX_ENTRIES) -> int:
        value = int(self.number(code))
        if not 0 <= value <= limit:
            self.refuse(f"it claims {value:,} {what}, and at most {limit:,} are read")
        return value

    def text(self, code: str = "Q") -> str:
        data = self.take(self.count(code, "bytes in one text", MAX_TEXT_NBYTES))
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.refuse(f"the text {data[:40]!r} is not UTF-8")


def read_directory(path: Path, kind: str) -> Directory:
    """The metadata and tensors of a file whose `general.type` must be `kind`. Raises ModelError."""
    try:
        with path.open("rb") as file:
            return _read_entries(Cursor(file, path), kind)
    except OSError as problem:
        raise ModelError(f"cannot read {path}: {problem.strerror}") from problem


def _read_entries(cursor: Cursor, kind: str) -> Directory:
    if cursor.take(4) != MAGIC:
        cursor.refuse("it is not a GGUF file")
    version = int(cursor.number("I"))
    if version != VERSION:
        cursor.refuse(f"it is GGUF version {version}, only version {VERSION} is supported")
    tensors, entries = cursor.count("Q", "tensors"), cursor.count("Q", "metadata entries")
    metadata = _read_metadata(cursor, entries, kind)
    infos = [_read_tensor_info(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment.bit_count() != 1 or not 8 <= alignment <= 1 << 16:
        cursor.refuse(
            f"its general.alignment is {quote_value(alignment)}, wanted a power of two from 8 to 65536"
        )
    start = -(-cursor.file.tell() // alignment) * alignment
    spans: dict[str, TensorSpan] = {}
    others = []
    for name, shape, number, offset in infos:
        if name in spans or name in others:
            cursor.refuse(f"it holds the tensor {printable(name)} twice")
        span = TensorSpan(start + offset, shape)
        if number != FLOAT32:
            others.append(name)
        elif span.offset + span.nbytes > cursor.size:
            cursor.refuse(
                f"it is truncated: the tensor {printable(name)} ends at byte {span.offset + span.nbytes:,}"
            )
        else:
            spans[name] = span
    return Directory(metadata, spans, tuple(others))


def _read_metadata(cursor: Cursor, entries: int, kind: str) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(entries):
        key = cursor.text()
        if key in metadata:
            cursor.refuse(f"it holds the key {printable(key)} twice")
        value = _read_value(cursor, int(cursor.number("I")))
        # a model's own GGUF stops here, before its vocabulary
        if key == "general.type" and value != kind:
            cursor.refuse(f"its general.type is {printable(str(value))}, wanted {kind}")
        metadata[key] = value
    if "general.type" not in metadata:
        cursor.refuse(f"it has no general.type, wanted {kind}")
    return metadata


def _read_value(cursor: Cursor, kind: int) -> Value:
    """Read one value; a list of numbers is skipped and read as an empty list."""
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind == TEXT:
        return cursor.text()
    if kind != LIST:
        cursor.refuse(f"it holds metadata of the unknown type {kind}")
    inner = int(cursor.number("I"))
    if inner == TEXT:
        return [cursor.text() for _ in range(cursor.count("Q", "texts in a list"))]
    if inner not in SCALARS:
        cursor.refuse(f"it holds a list of the unknown type {inner}")
    cursor.skip(int(cursor.number("Q")) * struct.calcsize(f"<{SCALARS[inner]}"))
    return []


def _read_tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read name, shape with the fastest axis last, type and offset of one tensor."""
    name = cursor.text()
    rank = cursor.count("I", f"axes of {printable(name)}", MAX_RANK)
    sizes = tuple(
        cursor.count("Q", f"values along an axis of {printable(name)}", cursor.size) for _ in range(rank)
    )
    return name, sizes[::-1], int(cursor.number("I")), int(cursor.number("Q"))


def read_tensor(path: Path, span: TensorSpan) -> mx.array:
    """Read the float32 tensor at `span`. Raises ModelError if the file has changed meanwhile."""
    try:
        with path.open("rb") as file:
            file.seek(span.offset)
            data = file.read(span.nbytes)
    except OSError as problem:
        raise ModelError(f"cannot read {path}: {problem.strerror}") from problem
    if len(data) != span.nbytes:
        raise ModelError(f"cannot read {path}: it was truncated while it was being read")
    values = memoryview(data).cast("f")  # MLX takes buffers, which its type stubs do not say
    return mx.array(values).reshape(span.shape)  # pyright: ignore[reportArgumentType]


def write_gguf(
    path: Path, metadata: Mapping[str, str | int | list[str]], tensors: Mapping[str, mx.array]
) -> None:
    """Write texts, 32-bit counts, lists of texts, and float32 tensors; `path` appears whole or not at all.

    Raises UsageError if it cannot be written.
    """
    try:
        with whole_file(path, sync=True) as temporary, temporary.open("wb") as file:
            file.writelines(_encode_file(metadata, tensors))
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror}") from problem


def _encode_file(
    metadata: Mapping[str, str | int | list[str]], tensors: Mapping[str, mx.array]
) -> Iterable[bytes]:
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_encode_text(key), *_encode_value(value)]
    offset = 0
    for name, tensor in tensors.items():
        head += [
            _encode_text(name),
            struct.pack("<I", tensor.ndim),
            struct.pack(f"<{tensor.ndim}Q", *tensor.shape[::-1]),
        ]
        head += [struct.pack("<IQ", FLOAT32, offset)]
        offset += _padded_nbytes(tensor.nbytes)
    yield _pad(b"".join(head))
    for tensor in tensors.values():
        yield _pad(bytes(memoryview(mx.contiguous(tensor))))  # pyright: ignore[reportArgumentType]


def _encode_value(value: str | int | list[str]) -> list[bytes]:
    if isinstance(value, str):
        return [struct.pack("<I", TEXT), _encode_text(value)]
    if isinstance(value, int):
        return [struct.pack("<II", UINT32, value)]
    return [struct.pack("<IIQ", LIST, TEXT, len(value)), *map(_encode_text, value)]


def _encode_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded_nbytes(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _pad(data: bytes) -> bytes:
    return data.ljust(_padded_nbytes(len(data)), b"\0")
