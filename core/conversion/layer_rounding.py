"""Rounds a model's matrices with compensation, layer by layer, on what a calibration text makes them read.

The text runs through the quantized model: each layer is rounded by the inputs that the rounded layers before
it give, then its outputs are computed anew. Hidden states, and rounded layers until they are written to their
shards, are files, so memory holds one layer; a run that was killed continues at the next window of text.
Owns these files. Embedding and MTP head are not rounded here.
"""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

from ..checkpoint.assemble import Tensor
from ..checkpoint.finite import is_finite, not_finite
from ..checkpoint.header import read_header
from ..checkpoint.packed import Packed
from ..checkpoint.weights import WeightScope
from ..errors import UsageError
from ..machine.backend import Policy, mx
from ..machine.files import read_text, whole_file
from ..model.cache import Cache
from ..model.layers import AttentionLayer, DeltaLayer, rms_norm
from ..model.network import make_layer
from ..model.observers import observe_layer
from ..ops.gated_delta import USUAL
from ..ops.linear import Projections
from ..ops.tiled import TiledExperts, TiledLinear
from ..quant.folds import Folds
from ..quant.gptq import compensate
from ..quant.rounding import quantize
from ..text.tokenizer import Tokenizer
from .layer_inputs import Inputs, SharedInputs, observe_inputs
from .pipeline import can_copy, read_unrounded, streams
from .source import Source, to_dense
from .writer import MLX_DTYPES, Unit

CALIBRATION_TEXT = Path(__file__).parents[1] / "measuring" / "calibration.txt"
MAX_TEXT_NBYTES = 256 << 20
WINDOW = 512  # tokens that are read with an empty cache
MAX_WINDOWS = 32
DENSE_NBYTES = 1 << 30  # of a layer in float32; a larger one stays as it is stored
HEAD = "lm_head"
UNREACHED = "unreached"
PASSES = 3  # over the weights of a layer: to see inputs, to round, to compute outputs
Tick = Callable[[str, int], None]  # a tensor's or a layer's name, bytes of weights in bfloat16


@dataclass(frozen=True)
class CalibrationText:
    """Windows of token ids from a text, spread over it; `digest` is the SHA-256 of the whole text."""

    name: str
    digest: str
    windows: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, path: Path, source: Source) -> "CalibrationText":
        """Read the text file `path`. Raises UsageError if it is shorter than one window."""
        text = read_text(path, UsageError, MAX_TEXT_NBYTES)
        ids = Tokenizer.load(source.folder).encode(text)
        size = min(WINDOW, source.config.max_position_embeddings)
        count = len(ids) // size
        if not count:
            raise UsageError(f"{path} has {len(ids):,} tokens, and calibration needs at least {size:,}")
        kept = min(count, MAX_WINDOWS)
        starts = (i * count // kept * size for i in range(kept))
        windows = tuple(tuple(ids[start : start + size]) for start in starts)
        return cls(path.name, hashlib.sha256(text.encode()).hexdigest(), windows)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))

    def states_nbytes(self, width: int) -> int:
        """The room that two sets of hidden states take on disk."""
        return 2 * 4 * self.tokens * width


class RoundedLayers(Mapping[str, Packed]):
    """The matrices in `files`, by canonical name, read whenever they are asked for."""

    def __init__(self, files: Iterable[Path], units: Mapping[str, Unit]):
        self._units, self._places = units, dict[str, Path]()
        self.unreached = 0  # experts, counted once for each of their matrices
        for path in files:
            header = read_header(path)
            stored = (name.removesuffix(".weight") for name in header.entries)
            self._places |= {name: path for name in stored if name in units}
            self.unreached += int(header.metadata[UNREACHED])

    def __getitem__(self, name: str) -> Packed:
        loaded, geometry = mx.load(str(self._places[name])), self._units[name].geometry
        if not isinstance(loaded, dict) or geometry is None:
            raise KeyError(name)
        parts = loaded[f"{name}.weight"], loaded[f"{name}.scales"], loaded.get(f"{name}.biases")
        return Packed(*parts, geometry.group_size, geometry.bits, geometry.mode)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def round_layers(
    source: Source,
    folds: Folds,
    units: Sequence[Unit],
    text: CalibrationText,
    folder: Path,
    clock: Callable[[int], Tick],
) -> RoundedLayers:
    """Round the packed matrices of all layers, and an output head of its own, into files of `folder`.

    Continues where an earlier run stopped; `clock` is given the bytes that are left. Raises OSError and
    ModelError.
    """
    by_name = {unit.name: unit for unit in units}
    names = [f"layers.{index}" for index in range(source.config.num_hidden_layers)]
    tensors = _Tensors(source, folds, by_name)
    names += [HEAD] if tensors.is_rounded(HEAD) else []
    files = [folder / f"{name}.safetensors" for name in names]
    if not all(file.exists() for file in files):
        folder.mkdir(exist_ok=True)
        states = _States(folder, text)
        begin = states.latest(len(names))
        left = sum(tensors.nbytes(name) for name in names[begin or 0 :])
        pass_on = _LayerPass(tensors, states, clock(PASSES * left))
        if begin is None:
            states.save(0, pass_on.embed())
        for index in range(begin or 0, len(names)):
            pass_on.round(index, names[index], files[index])
            if index + 1 < len(names):
                pass_on.advance(index, names[index], files[index])
            states.drop(index)
    return RoundedLayers(files, by_name)


class _Tensors:
    """The tensors of a conversion, before they are rounded."""

    def __init__(self, source: Source, folds: Folds, units: Mapping[str, Unit]):
        self.source, self.folds, self.units = source, folds, units

    def is_rounded(self, name: str) -> bool:
        """Whether the matrix is packed, and not copied from the source as it is."""
        unit = self.units.get(name)
        return unit is not None and unit.geometry is not None and not can_copy(self.source, self.folds, unit)

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows, or experts, `begin` to `end`; in the dtype of the result if it does not pack them."""
        unit, end = self.units[name], self.source.specs[name].shape[0] if end is None else end
        if unit.geometry is not None and not self.is_rounded(name):
            return self.source.read(name, begin, end)
        values = read_unrounded(self.source, self.folds, unit, begin, end)
        return values if unit.geometry else values.astype(MLX_DTYPES[unit.arrays["weight"].dtype])

    def of(self, module: str) -> list[str]:
        """The names of all tensors of a layer, or of the head."""
        return [name for name in self.units if name == module or name.startswith(f"{module}.")]

    def nbytes(self, module: str) -> int:
        return sum(map(self.source.weights_nbytes, self.of(module)))


class _LayerTensors(Mapping[str, Tensor]):
    """The tensors of one layer, read when they are asked for; those in `rounded` as they are there."""

    def __init__(self, tensors: _Tensors, names: Sequence[str], rounded: Mapping[str, Packed]):
        self._tensors, self._names, self._rounded = tensors, names, rounded

    def __getitem__(self, name: str) -> Tensor:
        return self._rounded[name] if name in self._rounded else self._tensors.rows(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _States:
    """Hidden states on disk: folder N has those before layer N, a file for each window of text."""

    def __init__(self, folder: Path, text: CalibrationText):
        self.folder, self.text = folder, text

    def _file(self, layer: int, window: int) -> Path:
        return self.folder / str(layer) / f"{window}.safetensors"

    def count(self, layer: int) -> int:
        """The number of windows from the first on whose states before `layer` are there."""
        windows = range(len(self.text.windows))
        return next((i for i in windows if not self._file(layer, i).exists()), len(windows))

    def latest(self, layers: int) -> int | None:
        """The last layer before which all states are known; None if there is none."""
        return max((i for i in range(layers) if self.count(i) == len(self.text.windows)), default=None)

    def read(self, layer: int, begin: int = 0) -> Iterator[mx.array]:
        """The states [1, T, hidden] float32 before `layer`, from window `begin` on."""
        for window in range(begin, len(self.text.windows)):
            loaded = mx.load(str(self._file(layer, window)))
            assert isinstance(loaded, dict)
            yield loaded["states"]

    def save(self, layer: int, states: Iterable[mx.array], begin: int = 0) -> None:
        """Write the states before `layer` from window `begin` on. Raises OSError."""
        (self.folder / str(layer)).mkdir(exist_ok=True)
        for window, x in enumerate(states, begin):
            _save(self._file(layer, window), {"states": x}, {})

    def drop(self, layer: int) -> None:
        shutil.rmtree(self.folder / str(layer))


class _LayerPass:
    """One step after the other of the pass through the layers."""

    def __init__(self, tensors: _Tensors, states: _States, tick: Tick):
        self.tensors, self.states, self.tick = tensors, states, tick
        self.source, self.config = tensors.source, tensors.source.config

    def embed(self) -> Iterator[mx.array]:
        """Look up each window in the embedding as the result has it."""
        windows = self.states.text.windows
        ids = sorted({index for window in windows for index in window})
        spans = self.source.slices("embed_tokens")
        table = mx.concatenate([self._embeddings([i - a for i in ids if a <= i < b], a, b) for a, b in spans])
        places = {index: place for place, index in enumerate(ids)}
        return (table[mx.array([places[i] for i in window])][None] for window in windows)

    def _embeddings(self, wanted: list[int], begin: int, end: int) -> mx.array:
        """Some rows, counted from `begin`, of the slice of the embedding from `begin` to `end`."""
        name = "embed_tokens"
        if not wanted:
            return mx.zeros((0, self.config.hidden_size))
        rows = to_dense(self.tensors.rows(name, begin, end), mx.float32)[mx.array(wanted)]
        geometry = self.tensors.units[name].geometry
        if geometry is not None and self.tensors.is_rounded(name):
            importance = self.tensors.folds.importance(name)
            rows = quantize(rows, geometry, importance, method="gptq").dequantize(mx.float32)
        mx.eval(rows)
        return rows

    def round(self, index: int, name: str, file: Path) -> None:
        """Round layer `index`, or the head, by the inputs that its states make it read."""
        if file.exists():
            return
        inputs = self._head_inputs(index) if name == HEAD else self._layer_inputs(index, name)
        arrays: dict[str, mx.array] = {}
        unreached = 0
        while inputs:  # whose memory is free once their last matrix is rounded
            matrix, own = inputs.popitem()
            if not self.tensors.is_rounded(matrix):
                continue
            packed = self._round_matrix(matrix, own)
            unreached += own.unreached()
            parts = zip(("weight", "scales", "biases"), packed.arrays, strict=False)
            arrays |= {f"{matrix}.{part}": array for part, array in parts}
            self.tick(matrix, self.source.weights_nbytes(matrix))
        _save(file, arrays, {UNREACHED: str(unreached)})

    def _layer_inputs(self, index: int, name: str) -> dict[str, Inputs]:
        """Run the layer before it is rounded, to see what its matrices read."""
        layer = self._make_layer(index, name, {})
        inputs = observe_inputs(layer, name, self.config.num_experts)
        for _ in self._forward(index, name, layer, self.states.read(index), inputs):
            pass
        for own in inputs.values():
            own.release()
        vars(layer).clear()  # its compiled functions refer to it
        return inputs

    def _head_inputs(self, index: int) -> dict[str, Inputs]:
        inputs = SharedInputs(lambda x: x)
        norm = to_dense(self.tensors.rows("norm"), mx.float32)
        for x in self.states.read(index):
            inputs.add(rms_norm(x, norm, self.config.rms_norm_eps))
            mx.eval(inputs.arrays)
        return {HEAD: inputs}

    def _round_matrix(self, name: str, inputs: Inputs) -> Packed:
        geometry, parts = self.tensors.units[name].geometry, []
        assert geometry is not None
        for begin, end in self.source.slices(name):
            weight = to_dense(self.tensors.rows(name, begin, end), mx.float32)
            if not is_finite(weight):
                raise not_finite(name)
            parts.append(compensate(weight, geometry, inputs.factor(begin, end)))
        joined = [mx.concatenate(list(arrays)) for arrays in zip(*(p.arrays for p in parts), strict=True)]
        mx.eval(joined)
        words, scales, *biases = joined
        return replace(parts[0], weight=words, scales=scales, biases=biases[0] if biases else None)

    def advance(self, index: int, name: str, file: Path) -> None:
        """Compute the states after layer `index` as it is rounded, from the first window that lacks them."""
        layer = self._make_layer(index, name, RoundedLayers([file], self.tensors.units))
        begin = self.states.count(index + 1)
        read = self.states.read(index, begin)
        self.states.save(index + 1, self._forward(index, name, layer, read, {}), begin)

    def _make_layer(
        self, index: int, name: str, rounded: Mapping[str, Packed]
    ) -> AttentionLayer | DeltaLayer:
        policy = Policy(mx.float32, dense=2 * self.tensors.nbytes(name) <= DENSE_NBYTES)
        tensors = _LayerTensors(self.tensors, self.tensors.of(name), rounded)
        kind = self.config.layer_types[index]
        layer = make_layer(self.config, WeightScope(tensors).within(name), kind, policy)
        if isinstance(layer, DeltaLayer):
            layer.mixer.forms = USUAL  # whatever won its race, so that another run computes the same
        if not policy.dense:
            for _ in observe_layer(layer, name, self.config.num_experts, _tiled):
                pass
        return layer

    def _forward(
        self,
        index: int,
        name: str,
        layer: AttentionLayer | DeltaLayer,
        states: Iterable[mx.array],
        inputs: Mapping[str, Inputs],
    ) -> Iterator[mx.array]:
        """Yield the outputs for each window of states, and evaluate `inputs`; a few windows at once."""
        pending: deque[mx.array] = deque()
        share = self.tensors.nbytes(name) // len(self.states.text.windows)
        for x, stream in zip(states, cycle(streams()), strict=False):
            with mx.stream(stream):
                pending.append(layer(x, Cache.empty(self.config, mx.float32).layers[index]))
            mx.async_eval(pending[-1], [own.arrays for own in inputs.values()])
            if len(pending) == len(streams()):
                yield self._evaluate(pending.popleft(), name, share)
        while pending:
            yield self._evaluate(pending.popleft(), name, share)

    def _evaluate(self, x: mx.array, name: str, share: int) -> mx.array:
        mx.eval(x)
        self.tick(name, share)
        return x


def _tiled(product: Callable, _names: tuple[str, ...], experts: int) -> Callable:
    """Return what computes the same as a layer's `product` without holding its dense weights."""
    if experts:
        return TiledExperts(product.weight)  # pyright: ignore[reportFunctionMemberAccess]
    if isinstance(product, Projections):
        parts = [TiledLinear(weight) for weight in product.weights]
        return lambda x: [part(x) for part in parts]
    return TiledLinear(product.weight)  # pyright: ignore[reportFunctionMemberAccess]


def _save(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a file that is whole once it has its name. Raises OSError."""
    mx.eval(list(arrays.values()))
    with whole_file(path, sync=True) as temporary:
        mx.save_safetensors(str(temporary), arrays, metadata)
