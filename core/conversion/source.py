"""The model to convert, read in slices of rows that nothing keeps: memory does not grow with the model.

A slice goes through the same checks as a loaded model: raw, FP8 and converted layouts, experts in any form.
Owns what the loader passes over, the vision tower. Refuses a folder that changes while it is being read.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.assemble import FLOATS, FP8_BLOCK, Assembler, Tensor
from ..checkpoint.config import ModelConfig
from ..checkpoint.header import read_header
from ..checkpoint.layouts import VISION_PREFIXES, Spec, body_specs, mtp_specs
from ..checkpoint.packed import Geometry, Packed
from ..checkpoint.shards import find_shards
from ..checkpoint.stored import Checkpoint, Module, Stored, open_checkpoint
from ..checkpoint.weights import load_weights
from ..errors import WeightsError
from ..machine.backend import mx

SLICE_NBYTES = 32 << 20  # of weights in bfloat16; several slices are in flight at once
VISION = "vision_tower."
# how the bytes of a stored dtype become an array: the buffer's format, and the dtype that they mean
FORMATS = {
    "BF16": ("H", mx.bfloat16),
    "F16": ("H", mx.float16),
    "F32": ("f", mx.float32),
    "U32": ("I", mx.uint32),
    "U8": ("B", mx.uint8),
    "F8_E4M3": ("B", mx.uint8),
}


@dataclass(frozen=True, eq=False)
class Source:
    """One checked model folder, its tensors by canonical name, each read anew whenever it is asked for.

    `config` knows of an MTP head and a vision tower only where the files hold them.

    `specs` are all its tensors by canonical name, `packed` the triples of those that are quantized, `fp8`
    those stored in E4M3, `vision` the shapes of the vision tower's tensors, named `vision_tower.*` as in the
    converted layout. `watch` hears the name of every tensor of which something is read.
    """

    folder: Path
    config: ModelConfig
    specs: Mapping[str, Spec]
    packed: Mapping[str, Geometry]
    fp8: frozenset[str]
    vision: Mapping[str, tuple[int, ...]]
    repairs: tuple[str, ...]
    files: tuple[tuple[str, int, int], ...]
    _small: Mapping[str, mx.array]
    _checkpoint: Checkpoint
    _vision: Mapping[str, "_Vision"]
    watch: Callable[[str], None] | None = None

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """Check every header of `folder` and read its small tensors. Raises ModelError."""
        config = ModelConfig.load(folder)
        weights = load_weights(folder, config)
        checkpoint, vision = open_checkpoint(folder), _find_vision(folder, config)
        blind = "vision_config" in config.raw and not vision
        raw = {**config.raw, "language_model_only": True} if blind else config.raw
        config = replace(config, mtp_num_hidden_layers=int(weights.has_mtp), raw=raw)
        specs = body_specs(config) | (mtp_specs(config) if weights.has_mtp else {})
        small = {name: weights.tensors[name] for name, spec in specs.items() if spec.kind != "matrix"}
        tensors = weights.tensors.items()
        return cls(
            folder=folder,
            config=config,
            specs=specs,
            packed={name: tensor.geometry for name, tensor in tensors if isinstance(tensor, Packed)},
            fp8=frozenset(name for name, module in checkpoint.modules.items() if "scale_inv" in module),
            vision={name: tensor.shape for name, tensor in vision.items()},
            repairs=weights.repairs,
            files=_fingerprint(folder),
            _small={name: tensor for name, tensor in small.items() if isinstance(tensor, mx.array)},
            _checkpoint=checkpoint,
            _vision=vision,
        )

    @property
    def is_quantized(self) -> bool:
        return bool(self.packed or self.fp8)

    def check_unchanged(self) -> None:
        """Raises WeightsError where a file of the folder is no longer what it was when it was opened."""
        if _fingerprint(self.folder) != self.files:
            raise WeightsError(f"{self.folder} changed while it was being converted: convert it again")

    def slices(self, name: str) -> Iterator[tuple[int, int]]:
        """Begin and end along the first axis of each slice of a matrix, together all of it."""
        rows, *rest = self.specs[name].shape
        step = max(1, SLICE_NBYTES // (2 * math.prod(rest)))
        if not rest[1:]:  # [N, K] in FP8 has one scale for each block of rows
            step = max(FP8_BLOCK, step // FP8_BLOCK * FP8_BLOCK)
        yield from ((begin, min(begin + step, rows)) for begin in range(0, rows, step))

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """The canonical tensor `name`, or of a matrix its rows (or experts) from `begin` to `end`.

        As `load_weights` delivers it, but in memory and kept by nobody. `begin` is a multiple of FP8_BLOCK
        in an FP8 matrix. Raises WeightsError.
        """
        if self.watch is not None:
            self.watch(name)
        if name in self._small:
            return self._small[name]
        kind, (rows, *rest) = self.specs[name].kind, self.specs[name].shape
        end = rows if end is None else end
        window = _Window(self.folder, self._narrowed(name, begin, end))
        unhinted = replace(self.config, quantization=None)
        return Assembler(window, unhinted).build(name, Spec(kind, (end - begin, *rest)))

    def weights_nbytes(self, name: str) -> int:
        """Of a tensor, also of the vision tower, in bfloat16."""
        return 2 * math.prod(self.specs[name].shape if name in self.specs else self.vision[name])

    def row(self, name: str, index: int) -> mx.array:
        """One row [K] of a matrix [N, K], dense and float32."""
        begin = index // FP8_BLOCK * FP8_BLOCK if name in self.fp8 else index
        return dense(self.read(name, begin, index + 1), mx.float32)[-1]

    def read_vision(self, name: str) -> mx.array:
        """One tensor of `vision`, in its dtype. Raises WeightsError."""
        tensor = self._vision[name]
        values = _read(tensor.stored)
        return values.transpose(0, 2, 3, 4, 1) if tensor.is_channels_first else values

    def _narrowed(self, name: str, begin: int, end: int) -> dict[str, Module]:
        """What rows `begin` to `end` of `name` are made of; experts one by one are numbered from 0 again."""
        modules = self._checkpoint.modules
        base, _, projection = name.partition("switch_mlp.")
        for whole in (name, f"{base}experts.{projection}", f"{base}experts.gate_up_proj"):
            if whole in modules:
                rows = self.specs[name].shape[0]
                parts = modules[whole].items()
                return {whole: {part: _cut(stored, begin, end, rows) for part, stored in parts}}
        return {
            f"{base}experts.{expert - begin}.{projection}": modules[f"{base}experts.{expert}.{projection}"]
            for expert in range(begin, end)
        }


@dataclass(frozen=True)
class _Vision:
    """A stored tensor of the vision tower; a patch embedding may lie as Hugging Face has it, [N, C, T, H, W]
    where MLX has [N, T, H, W, C]."""

    stored: Stored
    is_channels_first: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.stored.entry.shape
        return (shape[0], *shape[2:], shape[1]) if self.is_channels_first else shape


class _Window(Checkpoint):
    """A few stored tensors, read when they are asked for and forgotten."""

    def __init__(self, folder: Path, modules: dict[str, Module]):
        super().__init__(folder, modules)

    def array(self, stored: Stored) -> mx.array:
        return _read(stored)


def dense(tensor: Tensor, dtype: mx.Dtype) -> mx.array:
    """The tensor, unpacked where it is packed, in `dtype`."""
    return tensor.dequantize(dtype) if isinstance(tensor, Packed) else tensor.astype(dtype)


def _cut(stored: Stored, begin: int, end: int, rows: int) -> Stored:
    """Rows of a tensor that has one entry per row of `rows`, or one per block of FP8_BLOCK rows."""
    entry = stored.entry
    count, *rest = entry.shape
    if count != rows:
        begin, end = begin // FP8_BLOCK, math.ceil(end / FP8_BLOCK)
    nbytes = (entry.end - entry.begin) // count
    at = (entry.begin + begin * nbytes, entry.begin + end * nbytes)
    return Stored(stored.path, replace(entry, shape=(end - begin, *rest), begin=at[0], end=at[1]))


def _read(stored: Stored) -> mx.array:
    entry = stored.entry
    try:
        with stored.path.open("rb") as file:
            header_nbytes = int.from_bytes(file.read(8), "little")
            file.seek(8 + header_nbytes + entry.begin)
            data = bytearray(entry.end - entry.begin)
            count = file.readinto(data)
    except OSError as error:
        raise stored.refuse(f"cannot be read: {error.strerror}") from error
    if count != len(data):
        raise stored.refuse("was cut while it was being read")
    if entry.dtype not in FORMATS or sys.byteorder != "little":
        raise stored.refuse(f"has the dtype {entry.dtype}, which a conversion cannot read on this machine")
    code, dtype = FORMATS[entry.dtype]
    values = mx.array(memoryview(data).cast(code))  # pyright: ignore  # MLX takes buffers, its type stubs do not say so
    return values.view(dtype).reshape(entry.shape)


def _find_vision(folder: Path, config: ModelConfig) -> dict[str, _Vision]:
    """The vision tower by its names in the converted layout. Raises WeightsError where it is packed."""
    fields = config.raw.get("vision_config")
    channels = fields.get("in_channels", 3) if isinstance(fields, Mapping) else 3
    found: dict[str, _Vision] = {}
    for header in map(read_header, find_shards(folder).paths):
        for entry in header.entries.values():
            prefix = next((prefix for prefix in VISION_PREFIXES if entry.name.startswith(prefix)), None)
            if prefix is None:
                continue
            stored, shape = Stored(header.path, entry), entry.shape
            if entry.dtype not in FLOATS:
                raise stored.refuse(f"is {entry.dtype}, and a vision tower is copied in floating point only")
            first = len(shape) == 5 and shape[1] == channels and "visual." in prefix
            found[VISION + entry.name.removeprefix(prefix)] = _Vision(stored, first)
    return found


def _fingerprint(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of the config and of every weight file."""
    shards = find_shards(folder)
    paths = [folder / "config.json", *shards.paths, *([shards.mtp] if shards.mtp else [])]
    try:
        stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in paths]
    except OSError as error:
        raise WeightsError(f"cannot read {error.filename}: {error.strerror}") from error
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
