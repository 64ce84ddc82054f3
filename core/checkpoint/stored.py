"""The stored tensors of a model folder, checked and sorted by canonical module, before any of them is read.

Owns opening the files lazily. Refuses a tensor stored twice and one that is not where the index says.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ModelError, WeightsError
from ..machine.backend import mx
from .header import Entry, Header, read_header, shown
from .layouts import MTP_PREFIX, Part, is_derived, is_vision, split_part
from .shards import INDEX_NAME, find_shards


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in the file at `path`."""

    path: Path
    entry: Entry

    @property
    def columns(self) -> int:
        """The size of the last axis."""
        return self.entry.shape[-1] if self.entry.shape else 0

    def refuse(self, found: str) -> WeightsError:
        return WeightsError(f"{self.path}: the tensor {shown(self.entry.name)} {found}")

    def check_shape(self, *wanted: tuple[int, ...]) -> None:
        if self.entry.shape not in wanted:
            shapes = " or ".join(str(list(shape)) for shape in wanted)
            raise self.refuse(f"has the shape {list(self.entry.shape)}, wanted {shapes}")


Module = dict[Part, Stored]


@dataclass
class Checkpoint:
    """`modules` by canonical name; `vision` counts the ignored tensors of the vision tower."""

    folder: Path
    modules: dict[str, Module] = field(default_factory=dict)
    vision: int = 0
    mtp_file: Path | None = None
    _open: dict[Path, dict[str, mx.array]] = field(default_factory=dict)

    @property
    def has_mtp(self) -> bool:
        return any(name.startswith(MTP_PREFIX) for name in self.modules)

    def array(self, stored: Stored) -> mx.array:
        """The tensor, still on disk: MLX reads it when something evaluates it."""
        if stored.path not in self._open:
            try:
                arrays = mx.load(str(stored.path))
            except (RuntimeError, ValueError) as error:
                raise WeightsError(f"MLX cannot open {stored.path}: {shown(str(error))}") from error
            self._open[stored.path] = dict(arrays) if isinstance(arrays, dict) else {}
        return self._open[stored.path][stored.entry.name]

    def add(self, header: Header) -> None:
        """Sort the tensors of one file in. Raises WeightsError for a module that is there already."""
        for entry in header.entries.values():
            if is_vision(entry.name):
                self.vision += 1
            elif not is_derived(entry.name):
                self._add(Stored(header.path, entry))

    def _add(self, stored: Stored) -> None:
        name, part = split_part(stored.entry.name, mtp_file=stored.path == self.mtp_file)
        module = self.modules.setdefault(name, {})
        if part in module:
            other = module[part]
            raise stored.refuse(f"is stored twice, also as {shown(other.entry.name)} in {other.path}")
        module[part] = stored


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check the headers of every weight file of `folder`. Raises ModelError, WeightsError."""
    if not folder.is_dir():
        raise ModelError(f"there is no model folder at {folder}")
    shards = find_shards(folder)
    checkpoint = Checkpoint(folder, mtp_file=shards.mtp)
    headers = {path.name: read_header(path) for path in shards.paths}
    for tensor, shard in shards.index.items():
        if tensor not in headers[shard].entries:
            where = f"{folder / INDEX_NAME} places {shown(tensor)} in {shard}"
            raise WeightsError(f"{where}, which does not hold it")
    for header in headers.values():
        checkpoint.add(header)
    if shards.mtp is not None:
        checkpoint.add(read_header(shards.mtp))
    return checkpoint
