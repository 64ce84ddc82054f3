"""The importance matrix: the mean square of every input channel of every projection, measured on a text.

Reads llama.cpp's GGUF files and its older `.dat`, translating names and the order of value heads to ours;
writes GGUF. Refuses files of another model, and values that cannot be sums of squares.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX, body_specs, mtp_specs
from ..errors import ModelError
from ..machine.backend import mx
from ..machine.files import LFS_POINTER, refuse_lfs_pointer
from ..quoting import printable
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
# modules within a layer that read the same input; of experts, a share of its rows each
SAME_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"),
    (
        "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.gate", "mlp.shared_expert_gate",
        "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj",
    ),
)  # fmt: skip
BLOCK_STEMS = {modules[0]: stem for stem, modules in BLOCK_NAMES.items() if len(modules) == 1}
MTP_INPUT = "nextn.eh_proj"
BLOCK = re.compile(r"blk\.(\d{1,4})\.(.+)")
KEYS = ("datasets", "chunk_count", "chunk_size")
SUM, COUNT = ".in_sum2", ".counts"
VALUE_HEADS = ".linear_attn.out_proj"
EXPERTS = ".switch_mlp."
MAX_CALLS = 1 << 40


@dataclass(frozen=True)
class Statistics:
    """Measurements at the input of one module: sums of squares [K] or [E, K], and the number of vectors.

    `counts` is [1], or [E] for experts; both are float32.
    """

    sums: mx.array
    counts: mx.array


@dataclass(frozen=True)
class _Values:
    """The place of one module's values in the file; `calls` replaces the counts that a `.dat` lacks."""

    name: str
    sums: TensorSpan
    counts: TensorSpan | None
    calls: float = 1.0


@dataclass(frozen=True)
class Imatrix:
    """An imatrix file checked against a model; values are read when they are asked for.

    `unmatched` are names in the file without a module in the model. A matrix that the file lacks has the
    values of another one with the same input, if there is one: `borrowed` says of which. `missing` are the
    other matrices of the model, without the MTP head, that the file lacks. `chunk_size` is 0 in a `.dat`,
    which does not record it.
    """

    path: Path
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]
    borrowed: Mapping[str, str]
    _config: ModelConfig = field(repr=False)
    _values: Mapping[str, _Values] = field(repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self._values or name in self.borrowed

    def __iter__(self) -> Iterator[str]:
        yield from (*self._values, *self.borrowed)

    def importance(self, name: str) -> mx.array | None:
        """E[x^2] per input channel of the canonical module `name`, float32 [K] or [E, K]; None if unknown.

        An expert that no token reached gets the mean over all experts; if nothing was measured at all, every
        channel counts alike. A channel that was always 0 has importance 0. Raises ModelError for values that
        cannot be sums of squares.
        """
        measured = self.statistics(name)
        return None if measured is None else _mean_squares(measured.sums, measured.counts)

    def statistics(self, name: str) -> Statistics | None:
        """The sums and counts behind `importance`, for adding to or writing again. Raises ModelError."""
        if name in self.borrowed:
            return self._borrow(name, self.borrowed[name])
        source = self._values.get(name)
        if source is None:
            return None
        sums = self._read(source, source.sums)
        counts = mx.array([source.calls]) if source.counts is None else self._read(source, source.counts)
        return Statistics(_untile_heads(sums, self._config) if name.endswith(VALUE_HEADS) else sums, counts)

    def _borrow(self, name: str, lender: str) -> Statistics | None:
        """The statistics of another reader of the same input; for one matrix, of all experts together."""
        lent = self.statistics(lender)
        if lent is None or lent.sums.ndim == 1 or EXPERTS in name:
            return lent
        return Statistics(lent.sums.sum(axis=0), lent.counts.sum(keepdims=True))

    def _read(self, source: _Values, span: TensorSpan) -> mx.array:
        values = read_tensor(self.path, span)
        if not mx.all(mx.isfinite(values) & (values >= 0)):
            raise ModelError(
                f"{self.path}: {printable(source.name)} holds values that are no sums of squares"
            )
        return values


def read_imatrix(path: Path, config: ModelConfig) -> Imatrix:
    """Read and check a whole GGUF or `.dat` imatrix for a model with this config. Raises ModelError."""
    if not path.is_file():
        raise ModelError(f"there is no imatrix file at {path}")
    try:
        with path.open("rb") as file:
            beginning = file.read(len(LFS_POINTER))
    except OSError as problem:
        raise ModelError(f"cannot read the imatrix {path}: {problem.strerror}") from problem
    refuse_lfs_pointer(path, beginning, ModelError)
    names = _Collector(path, config)
    imatrix = _read_gguf(names) if beginning.startswith(MAGIC) else _read_dat(names)
    if not names.sources:
        raise ModelError(f"the imatrix {path} names no module of this model: it was made from another one")
    for name in imatrix:
        imatrix.importance(name)
    return imatrix


class _Collector:
    """Collects the values of a file under the names of the model, with shapes checked.

    With `mtp` the block after the last layer is the MTP head; otherwise it is a layer of a deeper model.
    """

    def __init__(self, path: Path, config: ModelConfig):
        self.path, self.config, self.mtp = path, config, False
        self.sources: dict[str, _Values] = {}
        self.unmatched: list[str] = []
        self.wanted: dict[str, tuple[int, ...]] = {}
        for name, spec in (body_specs(config) | mtp_specs(config)).items():
            if spec.kind == "matrix":
                self.wanted[name] = (*spec.shape[:-2], spec.shape[-1])

    def add(self, name: str, sums: TensorSpan, counts: TensorSpan | None, calls: float = 1.0) -> None:
        """Add the values of llama.cpp's weight `name`. Raises ModelError if their number is wrong."""
        modules = [module for module in self._modules(name) if module in self.wanted]
        if not modules:
            self.unmatched.append(name)
        for module in modules:
            wanted = self.wanted[module]
            matrices = math.prod(wanted[:-1])
            if sums.nbytes != 4 * math.prod(wanted) or (counts and counts.nbytes not in (4, 4 * matrices)):
                raise ModelError(
                    f"the imatrix {self.path} has {sums.nbytes // 4:,} values for {printable(name)}, and "
                    f"{module} wants {math.prod(wanted):,}: it was made from another model"
                )
            per_matrix = counts and TensorSpan(counts.offset, (counts.nbytes // 4,))
            self.sources[module] = _Values(name, TensorSpan(sums.offset, wanted), per_matrix, calls)

    def _modules(self, name: str) -> tuple[str, ...]:
        """The canonical modules that `name` may mean; they may not exist."""
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

    def _lender(self, name: str) -> str | None:
        """A module in the file that reads the same input as `name`."""
        for group in SAME_INPUT:
            own = next((module for module in group if name.endswith(f".{module}")), None)
            if own is not None:
                lenders = (name.removesuffix(own) + module for module in group)
                if found := next((lender for lender in lenders if lender in self.sources), None):
                    return found
        return None

    def imatrix(self, datasets: Sequence[str], chunk_count: int, chunk_size: int) -> Imatrix:
        never_multiplied = () if self.config.tie_word_embeddings else ("embed_tokens",)
        missing = self.wanted.keys() - self.sources.keys() - set(never_multiplied)
        lenders = ((name, self._lender(name)) for name in self.wanted if name in missing)
        borrowed = {name: lender for name, lender in lenders if lender is not None}
        return Imatrix(
            path=self.path,
            datasets=tuple(datasets),
            chunk_count=chunk_count,
            chunk_size=chunk_size,
            unmatched=tuple(self.unmatched),
            missing=tuple(
                name
                for name in self.wanted
                if name in missing - borrowed.keys() and not name.startswith(MTP_PREFIX)
            ),
            borrowed=borrowed,
            _config=self.config,
            _values=self.sources,
        )


def _llama_name(module: str, config: ModelConfig) -> str:
    """llama.cpp's name of the weight of a canonical module."""
    if module in ("embed_tokens", "lm_head"):
        return "token_embd.weight" if module == "embed_tokens" else "output.weight"
    if module == "mtp.fc":
        return f"blk.{config.num_hidden_layers}.{MTP_INPUT}.weight"
    _, number, inner = module.removeprefix(MTP_PREFIX).split(".", 2)
    block = config.num_hidden_layers if module.startswith(MTP_PREFIX) else number
    return f"blk.{block}.{BLOCK_STEMS[inner]}.weight"


def _read_gguf(names: _Collector) -> Imatrix:
    directory = read_directory(names.path, "imatrix")
    tensors = dict(directory.tensors)
    names.mtp = _llama_name("mtp.fc", names.config) + SUM in tensors
    for stored in [name for name in tensors if name.endswith(SUM)]:
        name = stored.removesuffix(SUM)
        sums, counts = tensors.pop(stored), tensors.pop(name + COUNT, None)
        if counts is None:
            raise ModelError(f"the imatrix {names.path} has {printable(stored)} without its {COUNT}")
        names.add(name, sums, counts)
    names.unmatched += [*tensors, *directory.others]
    datasets, chunks, size = (directory.metadata.get(f"imatrix.{key}") for key in KEYS)
    return names.imatrix(
        datasets if isinstance(datasets, list) else (),
        chunks if isinstance(chunks, int) else 0,
        size if isinstance(size, int) else 0,
    )


def _read_dat(names: _Collector) -> Imatrix:
    """Read entries of name, calls, and mean squares times calls; then the chunk count and the dataset."""
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
    """sums [K] or [E, K] divided by counts [1] or [E]; for a count of 0 the mean of all, or else 1."""
    rows, counts = sums.reshape(-1, sums.shape[-1]), counts[:, None]  # [E, K], [E, 1] or [1, 1]
    overall = rows.sum(axis=0) / mx.maximum(counts.sum(), 1) if counts.sum() > 0 else mx.ones(rows.shape[-1])
    return mx.where(counts > 0, rows / mx.maximum(counts, 1), overall).reshape(sums.shape)


def _untile_heads(values: mx.array, config: ModelConfig) -> mx.array:
    """Reorder channels [Hv * Dv] from llama.cpp's tiled heads to the order of the checkpoint.

    Tiled, head t = j * Hk + k reads key head k; in the checkpoint that is head k * r + j, with r = Hv / Hk.
    """
    heads = config.linear_num_key_heads
    return values.reshape(-1, heads, config.linear_value_head_dim).swapaxes(0, 1).reshape(-1)


def _tile_heads(values: mx.array, config: ModelConfig) -> mx.array:
    """The inverse of `_untile_heads`."""
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

    Raises UsageError if `path` cannot be written.
    """
    tensors: dict[str, mx.array] = {}
    for name, module in sorted((_llama_name(module, config), module) for module in statistics):
        measured = statistics[module]
        sums = _tile_heads(measured.sums, config) if module.endswith(VALUE_HEADS) else measured.sums
        tensors[name + SUM] = sums.astype(mx.float32)
        counts = measured.counts.astype(mx.float32)
        tensors[name + COUNT] = counts.reshape(-1, 1) if sums.ndim > 1 else counts.reshape(1)
    values = (list(datasets), chunk_count, chunk_size)
    metadata = {f"imatrix.{key}": value for key, value in zip(KEYS, values, strict=True)}
    write_gguf(path, {"general.type": "imatrix", **metadata}, tensors)
