"""The stored tensors of a model folder, sorted by canonical module; none of them is read.

Owns opening a folder, which reads and checks the header of each file once. Refuses a tensor stored twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ModelError, WeightsError
from ..quoting import printable
from .header import Entry, Header
from .layouts import MTP_PREFIX, Part, is_derived, is_vision, split_part
from .shards import Shards, find_shards, read_headers

CHUNK_NBYTES = 16 << 20


@dataclass(frozen=True)
class Stored:
    """One tensor, or some of its rows, as stored in the file that `header` describes."""

    header: Header
    entry: Entry

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def columns(self) -> int:
        """The size of the last axis."""
        return self.entry.shape[-1] if self.entry.shape else 0

    def refuse(self, found: str) -> WeightsError:
        return WeightsError(f"{self.path}: the tensor {printable(self.entry.name)} {found}")

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the tensor, CHUNK_NBYTES at a time. Raises WeightsError."""
        left = self.entry.end - self.entry.begin
        try:
            with self.path.open("rb") as file:
                file.seek(self.header.data_begin + self.entry.begin)
                while left > 0 and (chunk := file.read(min(left, CHUNK_NBYTES))):
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise self.refuse(f"cannot be read: {error.strerror}") from error

    def check_shape(self, *wanted: tuple[int, ...]) -> None:
        if self.entry.shape not in wanted:
            shapes = " or ".join(str(list(shape)) for shape in wanted)
            raise self.refuse(f"has the shape {list(self.entry.shape)}, wanted {shapes}")


Module = dict[Part, Stored]


def are_equal(left: Module, right: Module) -> bool:
    """Whether two modules hold the same bytes, in the same dtypes and shapes. Raises WeightsError."""
    if left.keys() != right.keys():
        return False
    pairs = [(left[part], right[part]) for part in left]
    if any((a.entry.dtype, a.entry.shape) != (b.entry.dtype, b.entry.shape) for a, b in pairs):
        return False
    return all(a == b for one, other in pairs for a, b in zip(one.chunks(), other.chunks(), strict=True))


@dataclass
class Checkpoint:
    """An opened model folder: its files, their headers, and the stored tensors by canonical module.

    `vision` holds the tensors of the vision tower, which are part of no module.
    """

    shards: Shards
    headers: tuple[Header, ...]
    modules: dict[str, Module] = field(default_factory=dict)
    vision: list[Stored] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.shards.folder

    @property
    def has_mtp(self) -> bool:
        return any(name.startswith(MTP_PREFIX) for name in self.modules)

    def add(self, header: Header) -> None:
        """Add the tensors of one file. Raises WeightsError for a module that is there already."""
        for entry in header.entries.values():
            if is_vision(entry.name):
                self.vision.append(Stored(header, entry))
            elif not is_derived(entry.name):
                self._add(Stored(header, entry))

    def _add(self, stored: Stored) -> None:
        name, part = split_part(stored.entry.name, mtp_file=stored.path == self.shards.mtp)
        module = self.modules.setdefault(name, {})
        if part in module:
            other = module[part]
            raise stored.refuse(f"is stored twice, also as {printable(other.entry.name)} in {other.path}")
        module[part] = stored


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check the headers of every weight file of `folder`. Raises ModelError, WeightsError."""
    if not folder.is_dir():
        raise ModelError(f"there is no model folder at {folder}")
    shards = find_shards(folder)
    checkpoint = Checkpoint(shards, read_headers(shards))
    for header in checkpoint.headers:
        checkpoint.add(header)
    return checkpoint
