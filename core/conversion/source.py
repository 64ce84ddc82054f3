"""The model to convert, read in slices of rows that are not kept, so memory does not grow with the model.

A slice passes the same checks as a loaded model: raw, FP8 and converted layouts, experts in any form. Owns
the vision tower's tensors by name. Refuses a folder that changes while it is being read.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.assemble import FP8_BLOCK, Assembler, Tensor
from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import Spec, body_specs, mtp_specs
from ..checkpoint.packed import Claim, Geometry, Hints, Packed
from ..checkpoint.reader import SliceReader
from ..checkpoint.shards import Shards, stamp_files
from ..checkpoint.stored import Checkpoint, Module, Stored, open_checkpoint
from ..checkpoint.vision import VisionTensor, find_vision
from ..checkpoint.weights import load_weights
from ..errors import WeightsError
from ..machine.backend import mx

SLICE_NBYTES = 32 << 20  # of weights in bfloat16; several slices are in flight at once
VISION = "vision_tower."
NO_HINTS = Hints(Claim(), {})  # the loader has compared the config's with the shapes already


@dataclass(frozen=True, eq=False)
class Source:
    """An opened model folder, whose tensors are read from disk each time they are asked for.

    `config` mentions an MTP head and a vision tower only if the files hold them. `specs` are all tensors by
    canonical name, `packed` the triples of those that are quantized, `fp8` those stored in E4M3. `vision` are
    the shapes of the vision tower's tensors, named `vision_tower.*` as in the converted layout. `watch` is
    called with the name of every tensor that is read.
    """

    folder: Path
    config: ModelConfig
    specs: Mapping[str, Spec]
    packed: Mapping[str, Geometry]
    fp8: frozenset[str]
    vision: Mapping[str, tuple[int, ...]]
    repairs: tuple[str, ...]
    stamps: str
    checkpoint: Checkpoint
    _small: Mapping[str, mx.array]
    _vision: Mapping[str, VisionTensor]
    _reader: SliceReader
    watch: Callable[[str], None] | None = None

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """Open `folder` once: check every header and read the small tensors. Raises ModelError."""
        config = ModelConfig.load(folder)
        checkpoint = open_checkpoint(folder)
        weights = load_weights(checkpoint, config)
        vision = {VISION + name: found for name, found in find_vision(checkpoint.vision, config).items()}
        blind = "vision_config" in config.raw and not vision
        raw = {**config.raw, "language_model_only": True} if blind else config.raw
        config = replace(weights.settle(config), mtp_num_hidden_layers=int(weights.has_mtp), raw=raw)
        specs = body_specs(config) | (mtp_specs(config) if weights.has_mtp else {})
        tensors = weights.tensors.items()
        small = {name: t for name, t in tensors if specs[name].kind != "matrix" and isinstance(t, mx.array)}
        mx.eval(list(small.values()))
        return cls(
            folder=folder,
            config=config,
            specs=specs,
            packed={name: tensor.geometry for name, tensor in tensors if isinstance(tensor, Packed)},
            fp8=frozenset(name for name, module in checkpoint.modules.items() if "scale_inv" in module),
            vision={name: tensor.shape for name, tensor in vision.items()},
            repairs=weights.repairs,
            stamps=_stamps(checkpoint.shards),
            checkpoint=checkpoint,
            _small=small,
            _vision=vision,
            _reader=SliceReader(),
        )

    @property
    def is_quantized(self) -> bool:
        return bool(self.packed or self.fp8)

    def check_unchanged(self) -> None:
        """Raise WeightsError if a file of the folder has changed since it was opened."""
        if _stamps(self.checkpoint.shards) != self.stamps:
            raise WeightsError(f"{self.folder} changed while it was being converted: convert it again")

    def slices(self, name: str) -> Iterator[tuple[int, int]]:
        """Begin and end of each slice along the first axis of a matrix; together they cover it."""
        rows, *rest = self.specs[name].shape
        step = max(1, SLICE_NBYTES // (2 * math.prod(rest)))
        if not rest[1:]:  # [N, K] in FP8 has one scale for each block of rows
            step = max(FP8_BLOCK, step // FP8_BLOCK * FP8_BLOCK)
        yield from ((begin, min(begin + step, rows)) for begin in range(0, rows, step))

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Read the canonical tensor `name`, or rows (or experts) `begin` to `end` of a matrix.

        The same as from `load_weights`, but in memory and not kept. In an FP8 matrix `begin` must be a
        multiple of FP8_BLOCK. Raises WeightsError.
        """
        if self.watch is not None:
            self.watch(name)
        if name in self._small:
            return self._small[name]
        kind, (rows, *rest) = self.specs[name].kind, self.specs[name].shape
        end = rows if end is None else end
        assembler = Assembler(
            self.folder, self._modules_of_rows(name, begin, end), self._reader.read, NO_HINTS
        )
        return assembler.build(name, Spec(kind, (end - begin, *rest)))

    def weights_nbytes(self, name: str) -> int:
        """The bfloat16 size of a tensor of the model or of its vision tower."""
        return 2 * math.prod(self.specs[name].shape if name in self.specs else self.vision[name])

    def row(self, name: str, index: int) -> mx.array:
        """One row [K] of a matrix [N, K], dense and float32."""
        begin = index // FP8_BLOCK * FP8_BLOCK if name in self.fp8 else index
        return to_dense(self.read(name, begin, index + 1), mx.float32)[-1]

    def read_vision(self, name: str) -> mx.array:
        """One tensor of `vision`, in its dtype. Raises WeightsError."""
        tensor = self._vision[name]
        values = self._reader.read(tensor.stored)
        return values.transpose(0, 2, 3, 4, 1) if tensor.is_channels_first else values

    def _modules_of_rows(self, name: str, begin: int, end: int) -> dict[str, Module]:
        """The stored modules behind rows `begin` to `end` of `name`; single experts are renumbered from 0."""
        modules = self.checkpoint.modules
        base, _, projection = name.partition("switch_mlp.")
        for whole in (name, f"{base}experts.{projection}", f"{base}experts.gate_up_proj"):
            if whole in modules:
                rows = self.specs[name].shape[0]
                parts = modules[whole].items()
                return {whole: {part: _slice_rows(stored, begin, end, rows) for part, stored in parts}}
        return {
            f"{base}experts.{expert - begin}.{projection}": modules[f"{base}experts.{expert}.{projection}"]
            for expert in range(begin, end)
        }


def to_dense(tensor: Tensor, dtype: mx.Dtype) -> mx.array:
    """The tensor in `dtype`, dequantized if it is packed."""
    return tensor.dequantize(dtype) if isinstance(tensor, Packed) else tensor.astype(dtype)


def _slice_rows(stored: Stored, begin: int, end: int, rows: int) -> Stored:
    """Rows `begin` to `end` of a tensor with an entry for each of `rows` rows or each block of FP8_BLOCK."""
    entry = stored.entry
    count, *rest = entry.shape
    if count != rows:
        begin, end = begin // FP8_BLOCK, math.ceil(end / FP8_BLOCK)
    nbytes = (entry.end - entry.begin) // count
    at = (entry.begin + begin * nbytes, entry.begin + end * nbytes)
    return Stored(stored.header, replace(entry, shape=(end - begin, *rest), begin=at[0], end=at[1]))


def _stamps(shards: Shards) -> str:
    """Names, sizes and modification times of the config and the weight files."""
    return stamp_files(shards.folder, (shards.folder / "config.json", *shards.files))
