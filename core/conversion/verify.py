"""Compares the result of a conversion with its source: every header, a sample of weights, one forward pass.

The forward pass reads one layer at a time and drops it, so it needs the memory of one layer for any model.
Refuses files that differ from their plan, weights unlike their source, and logits that are not finite.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle

from ..checkpoint.assemble import Tensor
from ..checkpoint.stored import Checkpoint
from ..checkpoint.weights import WeightScope
from ..errors import WeightsError
from ..machine.backend import choose_policy, mx
from ..model.cache import Cache
from ..model.fused_layers import kernel_form
from ..model.layers import rms_norm
from ..model.network import make_layer
from ..ops.candidates import Dimensions
from ..ops.linear import make_linear, materialize
from ..ops.tuning import settle
from ..text.tokenizer import Tokenizer
from .pipeline import streams
from .results import DENSE, Check
from .source import Source, to_dense
from .writer import Shard, Unit

PROBE = "The capital of Japan is Tokyo. Two and two make four, and a week has seven days.\n\ndef add(a, b):"
PROBE_TOKENS = 8
SAMPLES_PER_CODE = 4
SAMPLE_NBYTES = 8 << 20  # of rows in bfloat16
# the relative error above which a sample is another tensor: 2-bit codes reach 0.6, unrelated weights 1.4
MAX_ERROR = 0.9
TOO_MANY_PARAMETERS = 1 << 60  # too many for any machine to unpack the weights
Reference = Callable[[Unit, int, int], mx.array]
Tick = Callable[[str, int], None]  # a tensor's name, its bytes in bfloat16


def check_headers(checkpoint: Checkpoint, shards: Sequence[Shard]) -> None:
    """Raise WeightsError unless the files hold the tensors that `shards`, their plan, says."""
    headers = {header.path.name: header.entries.values() for header in checkpoint.headers}
    for shard in shards:
        written = {entry.name: (entry.dtype, entry.shape) for entry in headers.get(shard.file, ())}
        if written != {array.name: (array.dtype, array.shape) for array in shard.arrays}:
            path = checkpoint.folder / shard.file
            raise WeightsError(f"{path} does not hold the tensors that were written to it")


def compare_weights(result: Source, units: Sequence[Unit], reference: Reference) -> dict[str, float]:
    """The relative RMS error by code, of the first rows of some modules against what `reference` reads.

    Raises WeightsError for a module unlike its reference.
    """
    errors: dict[str, float] = {}
    for code, members in _group_by_code(units).items():
        stride = math.ceil(len(members) / SAMPLES_PER_CODE)
        errors[code] = max(_sample_error(result, unit, reference) for unit in members[::stride])
    return errors


def _group_by_code(units: Sequence[Unit]) -> dict[str, list[Unit]]:
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(str(unit.geometry) if unit.geometry else DENSE, []).append(unit)
    return groups


def _sample_error(result: Source, unit: Unit, reference: Reference) -> float:
    rows, *rest = result.specs[unit.name].shape
    end = min(rows, max(1, SAMPLE_NBYTES // (2 * math.prod(rest))))
    wanted = reference(unit, 0, end)
    error = relative_error(to_dense(result.read(unit.name, 0, end), mx.float32), wanted)
    if not error <= MAX_ERROR:
        raise WeightsError(
            f"{result.folder}: {unit.path} was written with a relative error of {error:.2f}, wanted at most "
            f"{MAX_ERROR}: the weights are damaged"
        )
    return error


def relative_error(actual: mx.array, wanted: mx.array) -> float:
    """rms(actual - wanted) / rms(wanted), of float32 arrays of one shape."""
    difference, size = (float(mx.square(x).sum()) for x in (actual - wanted, wanted))
    return math.sqrt(difference / size) if size else math.sqrt(difference)


def compare_logits(source: Source, result: Source, weights: dict[str, float], tick: Tick) -> Check:
    """Compare the logits of source and result after one short text; calls `tick` for each tensor read.

    Raises WeightsError if the logits of the result are not finite and those of the source are.
    """
    # before any layer decides whether to use kernels
    settle(Dimensions.of(source.config, {}, choose_policy(TOO_MANY_PARAMETERS)))
    ids = probe_ids(source)
    wanted, actual = stream_logits((source, result), ids, tick)
    if mx.isfinite(wanted).all() and not mx.isfinite(actual).all():
        raise WeightsError(f"{result.folder}: its logits are not finite, and those of its source are")
    ours, theirs = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (actual, wanted))
    divergence = (mx.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()
    same = (actual.argmax(axis=-1) == wanted.argmax(axis=-1)).mean()
    return Check(weights, len(ids), relative_error(actual, wanted), float(divergence), float(same))


def probe_ids(source: Source) -> list[int]:
    return Tokenizer.load(source.folder).encode(PROBE)[:PROBE_TOKENS]


def stream_logits(sources: Sequence[Source], ids: Sequence[int], tick: Tick) -> list[mx.array]:
    """Logits [T, V] float32 of each model after each of `ids` [T], computed side by side, layer by layer.

    The models have the same shape. Calls `tick` for each tensor that was used.
    """
    config = sources[0].config
    passes = [_Pass(source, ids, stream) for source, stream in zip(sources, cycle(streams()), strict=False)]
    for i in range(config.num_hidden_layers):
        for forward in passes:
            forward.enter(i)
        mx.eval([forward.x for forward in passes])
        for forward in passes:
            forward.leave(tick)
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    parts = []
    for span in sources[0].slices(head):
        parts.append([forward.logits(head, span) for forward in passes])
        mx.eval(parts[-1])  # so that the rows can go
    tick(head, len(passes) * sources[0].weights_nbytes(head))
    return [mx.concatenate(list(row), axis=-1) for row in zip(*parts, strict=True)]


class _Pass:
    """A forward pass of one model, layer by layer, on its own stream."""

    def __init__(self, source: Source, ids: Sequence[int], stream: mx.Stream):
        self._source, self._stream = source, stream
        self._config, self._policy = source.config, choose_policy(TOO_MANY_PARAMETERS)
        rows = [source.row("embed_tokens", index) for index in ids]
        self.x = mx.stack(rows)[None].astype(self._policy.activations)  # [1, T, hidden]
        self._memories = deque(Cache.empty(self._config, self._policy.activations).layers)

    def enter(self, index: int) -> None:
        """Compute layer `index`, lazily; its weights stay until `leave`."""
        self._read = _LazyTensors(self._source)
        with mx.stream(self._stream):
            weights, kind = WeightScope(self._read).within(f"layers.{index}"), self._config.layer_types[index]
            self._plain = make_layer(self._config, weights, kind, self._policy)
            self._layer = kernel_form(self._plain, self._policy)
            # a layer's memory, never evaluated, would hold on to its weights
            self.x = self._layer(self.x, self._memories.popleft())

    def leave(self, tick: Tick) -> None:
        for layer in (self._layer, self._plain):
            vars(layer).clear()  # its compiled functions refer to it
        for name in self._read.names:
            tick(name, self._source.weights_nbytes(name))

    def logits(self, name: str, span: tuple[int, int]) -> mx.array:
        """Logits [T, rows] float32, lazy: the last hidden states times some rows of the head."""
        with mx.stream(self._stream):
            norm = to_dense(self._source.read("norm"), mx.float32)
            hidden = rms_norm(self.x, norm, self._config.rms_norm_eps)
            head = make_linear(materialize(self._source.read(name, *span), self._policy))
            return head(hidden)[0].astype(mx.float32)


class _LazyTensors(Mapping[str, Tensor]):
    """Tensors read when a layer asks for them, which alone keeps them; `names` are those asked for."""

    def __init__(self, source: Source):
        self._source = source
        self.names: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.names.append(name)
        return self._source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.specs)

    def __len__(self) -> int:
        return len(self._source.specs)
