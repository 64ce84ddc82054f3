"""The importance matrix: the mean square of every input channel of every projection, measured on a text.

Reads llama.cpp's GGUF files and its older `.dat`, under our names and in our order of value heads; writes
the GGUF form. Refuses files of another model, and values that are no sums of squares.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.config import ModelConfig
from ..checkpoint.header import shown
from ..checkpoint.layouts import MTP_PREFIX, body_specs, mtp_specs
from ..errors import ModelError
from ..machine.backend import mx
from .gguf_file import MAGIC, MAX_ENTRIES, Cursor, TensorSpan, read_directory, read_tensor, write_gguf

# llama.cpp's name within `blk.N.`, and the module or modules within `layers.N.` that read that input
BLOCK_NAMES: Mapping[str, tuple[str, ...]] = {
    "attn_q": ("self_attn.q_proj",),
    "attn_k": ("self_attn.k_proj",),
    "attn_v": ("self_attn.v_proj",),
    "attn_output": ("self_attn.o_proj",),
    "attn_qkv": ("linear_attn.in_proj_qkv",),
    "attn_gate": ("linear_attn.in_proj_z",),
    "ssm_alpha": ("linear_attn.in_proj_a",),
    "ssm_beta": ("linear_attn.in_proj_b",),
    "ssm_out": ("linear_attn.out_proj",),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_up": ("mlp.up_proj",),
    "ffn_down": ("mlp.down_proj",),
    "ffn_gate_inp": ("mlp.gate",),
    "ffn_gate_exps": ("mlp.switch_mlp.gate_proj",),
    "ffn_up_exps": ("mlp.switch_mlp.up_proj",),
    "ffn_down_exps": ("mlp.switch_mlp.down_proj",),
    "ffn_gate_shexp": ("mlp.shared_expert.gate_proj",),
    "ffn_up_shexp": ("mlp.shared_expert.up_proj",),
    "ffn_down_shexp": ("mlp.shared_expert.down_proj",),
    "ffn_gate_inp_shexp": ("mlp.shared_expert_gate",),
    "ffn_gate_up_exps": ("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"),
}
BLOCK_STEMS = {modules[0]: stem for stem, modules in BLOCK_NAMES.items() if len(modules) == 1}
MTP_INPUT = "nextn.eh_proj"
BLOCK = re.compile(r"blk\.(\d{1,4})\.(.+)")
KEYS = ("datasets", "chunk_count", "chunk_size")
SUM, COUNT = ".in_sum2", ".counts"
VALUE_HEADS = ".linear_attn.out_proj"
MAX_CALLS = 1 << 40


@dataclass(frozen=True)
class Statistics:
    """What was measured at the input of one module: sums of squares [K] or [E, K], and how many vectors.

    `counts` is [1], or [E] for experts; both are float32.
    """

    sums: mx.array
    counts: mx.array


@dataclass(frozen=True)
class _Source:
    """Where one module's values stand; in a `.dat`, which has no counts, all are divided by `calls`."""

    name: str
    sums: TensorSpan
    counts: TensorSpan | None
    calls: float = 1.0


@dataclass(frozen=True)
class Imatrix:
    """One file, held against one model; values are read when they are asked for.

    `unmatched` are the file's names that mean no module of the model, `missing` the model's matrices, outside
    the MTP head, that the file says nothing about. `chunk_size` is 0 in a `.dat`, which does not know it.
    """

    path: Path
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]
    _config: ModelConfig = field(repr=False)
    _sources: Mapping[str, _Source] = field(repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def importance(self, name: str) -> mx.array | None:
        """E[x^2] per input channel of the canonical module `name`, float32 [K] or [E, K]; None if unknown.

        An expert that no token reached gets the mean over all experts; where nothing was measured at all,
        every channel counts alike. A channel that was always 0 has importance 0. Raises ModelError for values
        that are no sums of squares.
        """
        measured = self.statistics(name)
        return None if measured is None else _mean_squares(measured.sums, measured.counts)

    def statistics(self, name: str) -> Statistics | None:
        """The sums and counts behind `importance`, to be added to or written again. Raises ModelError."""
        source = self._sources.get(name)
        if source is None:
            return None
        sums = self._read(source, source.sums)
        counts = mx.array([source.calls]) if source.counts is None else self._read(source, source.counts)
        return Statistics(_consecutive(sums, self._config) if name.endswith(VALUE_HEADS) else sums, counts)

    def _read(self, source: _Source, span: TensorSpan) -> mx.array:
        values = read_tensor(self.path, span)
        if not mx.all(mx.isfinite(values) & (values >= 0)):
            raise ModelError(f"{self.path}: {shown(source.name)} holds values that are no sums of squares")
        return values


def read_imatrix(path: Path, config: ModelConfig) -> Imatrix:
    """Read and check all of a GGUF or `.dat` imatrix of a model with this config. Raises ModelError."""
    if not path.is_file():
        raise ModelError(f"there is no imatrix file at {path}")
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as problem:
        raise ModelError(f"cannot read the imatrix {path}: {problem.strerror}") from problem
    names = _Names(path, config)
    imatrix = _read_gguf(names) if magic == MAGIC else _read_dat(names)
    if not names.sources:
        raise ModelError(f"the imatrix {path} names no module of this model: it was made from another one")
    for name in imatrix:
        imatrix.importance(name)
    return imatrix


class _Names:
    """Collects what a file holds under the model's own names, shapes checked.

    With `mtp` the block after the last layer is the MTP head; else it is a layer of some deeper model.
    """

    def __init__(self, path: Path, config: ModelConfig):
        self.path, self.config, self.mtp = path, config, False
        self.sources: dict[str, _Source] = {}
        self.unmatched: list[str] = []
        self.wanted: dict[str, tuple[int, ...]] = {}
        for name, spec in (body_specs(config) | mtp_specs(config)).items():
            if spec.kind == "matrix":
                self.wanted[name] = (*spec.shape[:-2], spec.shape[-1])

    def add(self, name: str, sums: TensorSpan, counts: TensorSpan | None, calls: float = 1.0) -> None:
        """The values of llama.cpp's weight `name`. Raises ModelError where they are not as many as wanted."""
        modules = [module for module in self._modules(name) if module in self.wanted]
        if not modules:
            self.unmatched.append(name)
        for module in modules:
            wanted = self.wanted[module]
            matrices = math.prod(wanted[:-1])
            if sums.nbytes != 4 * math.prod(wanted) or (counts and counts.nbytes not in (4, 4 * matrices)):
                raise ModelError(
                    f"the imatrix {self.path} has {sums.nbytes // 4:,} values for {shown(name)}, and "
                    f"{module} wants {math.prod(wanted):,}: it was made from another model"
                )
            per_matrix = counts and TensorSpan(counts.offset, (counts.nbytes // 4,))
            self.sources[module] = _Source(name, TensorSpan(sums.offset, wanted), per_matrix, calls)

    def _modules(self, name: str) -> tuple[str, ...]:
        """The canonical modules that `name` may mean; they need not exist."""
        stem = name.removesuffix(".weight")
        if stem in ("token_embd", "output"):
            tied = self.config.tie_word_embeddings
            return ("embed_tokens",) if tied or stem == "token_embd" else ("lm_head",)
        block = BLOCK.fullmatch(stem)
        if block is None:
            return ()
        layer, modules = f"layers.{block[1]}", BLOCK_NAMES.get(block[2], ())
        if self.mtp and int(block[1]) == self.config.num_hidden_layers:
            layer = "mtp.layers.0"
            if block[2] == MTP_INPUT:
                return ("mtp.fc",)
        return tuple(f"{layer}.{module}" for module in modules)

    def imatrix(self, datasets: Sequence[str], chunk_count: int, chunk_size: int) -> Imatrix:
        never_multiplied = () if self.config.tie_word_embeddings else ("embed_tokens",)
        missing = self.wanted.keys() - self.sources.keys() - set(never_multiplied)
        return Imatrix(
            path=self.path,
            datasets=tuple(datasets),
            chunk_count=chunk_count,
            chunk_size=chunk_size,
            unmatched=tuple(self.unmatched),
            missing=tuple(
                name for name in self.wanted if name in missing and not name.startswith(MTP_PREFIX)
            ),
            _config=self.config,
            _sources=self.sources,
        )


def _name(module: str, config: ModelConfig) -> str:
    """llama.cpp's name of the weight of a canonical module."""
    if module in ("embed_tokens", "lm_head"):
        return "token_embd.weight" if module == "embed_tokens" else "output.weight"
    if module == "mtp.fc":
        return f"blk.{config.num_hidden_layers}.{MTP_INPUT}.weight"
    _, number, inner = module.removeprefix(MTP_PREFIX).split(".", 2)
    block = config.num_hidden_layers if module.startswith(MTP_PREFIX) else number
    return f"blk.{block}.{BLOCK_STEMS[inner]}.weight"


def _read_gguf(names: _Names) -> Imatrix:
    directory = read_directory(names.path, "imatrix")
    tensors = dict(directory.tensors)
    names.mtp = _name("mtp.fc", names.config) + SUM in tensors
    for stored in [name for name in tensors if name.endswith(SUM)]:
        name = stored.removesuffix(SUM)
        sums, counts = tensors.pop(stored), tensors.pop(name + COUNT, None)
        if counts is None:
            raise ModelError(f"the imatrix {names.path} has {shown(stored)} without its {COUNT}")
        names.add(name, sums, counts)
    names.unmatched += [*tensors, *directory.others]
    datasets, chunks, size = (directory.metadata.get(f"imatrix.{key}") for key in KEYS)
    return names.imatrix(
        datasets if isinstance(datasets, list) else (),
        chunks if isinstance(chunks, int) else 0,
        size if isinstance(size, int) else 0,
    )


def _read_dat(names: _Names) -> Imatrix:
    """Entries of name, calls, and mean squares times calls; then the number of chunks and the data's name."""
    with names.path.open("rb") as file:
        cursor = Cursor(file, names.path)
        entries = cursor.number("i")
        if not 0 < entries <= MAX_ENTRIES:
            cursor.refuse("it is neither a GGUF file nor an imatrix.dat")
        for _ in range(int(entries)):
            name = cursor.text("i")
            calls = cursor.count("i", "calls", MAX_CALLS)
            values = cursor.count("i", "values", cursor.left // 4)
            names.add(name, TensorSpan(file.tell(), (values,)), None, max(calls, 1))
            cursor.skip(4 * values)
        chunks = cursor.count("i", "chunks", MAX_CALLS) if cursor.left else 0
        datasets = [cursor.text("i")] if cursor.left else []
    return names.imatrix(datasets, chunks, 0)


def _mean_squares(sums: mx.array, counts: mx.array) -> mx.array:
    """sums [K] or [E, K] over counts [1] or [E]; where a count is 0, the mean of all, or else 1."""
    rows, counts = sums.reshape(-1, sums.shape[-1]), counts[:, None]  # [E, K], [E, 1] or [1, 1]
    overall = rows.sum(axis=0) / mx.maximum(counts.sum(), 1) if counts.sum() > 0 else mx.ones(rows.shape[-1])
    return mx.where(counts > 0, rows / mx.maximum(counts, 1), overall).reshape(sums.shape)


def _consecutive(values: mx.array, config: ModelConfig) -> mx.array:
    """Channels [Hv * Dv] whose heads llama.cpp tiles (head t = j * Hk + k reads key head k) in the order of
    the checkpoint (head k * r + j, of r = Hv / Hk)."""
    heads = config.linear_num_key_heads
    return values.reshape(-1, heads, config.linear_value_head_dim).swapaxes(0, 1).reshape(-1)


def _tiled(values: mx.array, config: ModelConfig) -> mx.array:
    """The inverse of `_consecutive`."""
    heads = config.linear_num_key_heads
    return values.reshape(heads, -1, config.linear_value_head_dim).swapaxes(0, 1).reshape(-1)


def write_imatrix(
    path: Path,
    statistics: Mapping[str, Statistics],
    config: ModelConfig,
    *,
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Write measurements by canonical module name as llama.cpp's GGUF, whole or not at all.

    Raises UsageError where `path` cannot be written.
    """
    tensors: dict[str, mx.array] = {}
    for name, module in sorted((_name(module, config), module) for module in statistics):
        measured = statistics[module]
        sums = _tiled(measured.sums, config) if module.endswith(VALUE_HEADS) else measured.sums
        tensors[name + SUM] = sums.astype(mx.float32)
        counts = measured.counts.astype(mx.float32)
        tensors[name + COUNT] = counts.reshape(-1, 1) if sums.ndim > 1 else counts.reshape(1)
    values = (list(datasets), chunk_count, chunk_size)
    metadata = {f"imatrix.{key}": value for key, value in zip(KEYS, values, strict=True)}
    write_gguf(path, {"general.type": "imatrix", **metadata}, tensors)
