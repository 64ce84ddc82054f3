"""Activation-aware scaling: which channels of a group of matrices to enlarge before they are rounded.

Lin et al., "AWQ" (arXiv 2306.00978): s = E[x^2]^(alpha / 2), alpha searched per group. Owns the groups of
this architecture and their exactness. Refuses an imatrix that changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX
from ..checkpoint.packed import Geometry
from ..errors import UsageError
from ..machine.backend import mx
from ..quant.folds import Folds, GroupReport
from ..quant.imatrix import Imatrix
from ..quant.recipes import Recipe
from ..quant.rounding import rounding_error
from .source import FP8_BLOCK, Source, dense

Mode = Literal["off", "fixed", "search"]
GROUPS = "ABCDEF"
# without the groups that made the model worse where this was measured (README, Measured)
DEFAULT_GROUPS = "AB"
ALPHAS = tuple(step / 10 for step in range(1, 11))
LIMIT = 16.0  # of a searched scale and of its inverse, around the geometric mean
FLOOR = 1e-8  # of the mean importance: a channel that was always 0 still has a scale
# of each matrix, whole rows out of places spread over it
SAMPLE_WEIGHTS, SAMPLE_PLACES = 1 << 20, 8


@dataclass(frozen=True)
class Group:
    """Matrices that read one input (`readers`), and the tensor whose outputs it consists of (`feeder`).

    Their inputs are `blocks` x `repeats` x C channels of which the repeats share a scale. `stacked`: each
    expert has scales of its own. `norm`: the feeder is a norm.
    """

    letter: str
    layer: str
    readers: tuple[str, ...]
    feeder: str
    norm: bool = False
    stacked: bool = False
    blocks: int = 1
    repeats: int = 1

    def reduce(self, importance: mx.array) -> mx.array:
        """Of input channels [K] or [E, K] to those that have a scale each, [S] or [E, S]."""
        if importance.ndim > 1 and not self.stacked:
            importance = importance.mean(axis=0)
        lead = importance.shape[:-1]
        return importance.reshape(*lead, self.blocks, self.repeats, -1).mean(axis=-2).reshape(*lead, -1)

    def expand(self, scales: mx.array) -> mx.array:
        """Scales [S] or [E, S] for all input channels, [K] or [E, K]."""
        lead = scales.shape[:-1]
        parts = scales.reshape(*lead, self.blocks, 1, -1)
        return mx.repeat(parts, self.repeats, axis=-2).reshape(*lead, -1)


def groups(config: ModelConfig, *, mtp: bool) -> Iterator[Group]:
    """Every group of the model, layer by layer; `mtp` says that its head is there too.

    A norm's group holds every matrix that reads the norm, or the model would change. The head's two input
    norms and the final norm, which feeds both heads, are in no group.
    """
    layers = [(f"layers.{layer}", kind) for layer, kind in enumerate(config.layer_types)]
    if mtp:
        layers.append((f"{MTP_PREFIX}layers.0", "full_attention"))
    for layer, kind in layers:
        yield from _attention(layer, config) if kind == "full_attention" else _delta_net(layer, config)
        yield from _experts(layer) if config.is_moe else _dense(layer)


def _named(layer: str, module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{layer}.{module}.{name}" for name in names)


def _attention(layer: str, config: ModelConfig) -> Iterator[Group]:
    readers = _named(layer, "self_attn", "q_proj", "k_proj", "v_proj")
    yield Group("C", layer, readers, f"{layer}.input_layernorm", norm=True)
    output, values = _named(layer, "self_attn", "o_proj", "v_proj")
    kv_heads = config.num_key_value_heads
    shared = config.num_attention_heads // kv_heads  # query heads that read one value head stand together
    yield Group("E", layer, (output,), values, blocks=kv_heads, repeats=shared)


def _delta_net(layer: str, config: ModelConfig) -> Iterator[Group]:
    readers = _named(layer, "linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")
    yield Group("D", layer, readers, f"{layer}.input_layernorm", norm=True)
    output, norm = _named(layer, "linear_attn", "out_proj", "norm")
    yield Group("F", layer, (output,), norm, norm=True, repeats=config.linear_num_value_heads)


def _dense(layer: str) -> Iterator[Group]:
    gate, up, down = _named(layer, "mlp", "gate_proj", "up_proj", "down_proj")
    yield Group("A", layer, (gate, up), f"{layer}.post_attention_layernorm", norm=True)
    yield Group("B", layer, (down,), up)


def _experts(layer: str) -> Iterator[Group]:
    gates = _named(layer, "mlp", "gate", "shared_expert_gate")
    shared = _named(layer, "mlp.shared_expert", "gate_proj", "up_proj", "down_proj")
    experts = _named(layer, "mlp.switch_mlp", "gate_proj", "up_proj", "down_proj")
    readers = (*gates, *shared[:2], *experts[:2])
    yield Group("A", layer, readers, f"{layer}.post_attention_layernorm", norm=True)
    yield Group("B", layer, experts[2:], experts[1], stacked=True)
    yield Group("B", layer, shared[2:], shared[1])


def search(
    source: Source,
    config: ModelConfig,
    recipe: Recipe,
    imatrix: Imatrix | None,
    mode: Mode = "search",
    letters: str = DEFAULT_GROUPS,
) -> Folds:
    """The scales for the tensors of `source`, a few of whose rows are read, one group after the other.

    Mode "fixed" is alpha 1 everywhere, without limits; `letters` are the groups to look at. Raises UsageError
    without an imatrix, and where no group was changed.
    """
    if mode == "off":
        return Folds(imatrix)
    if imatrix is None:
        raise UsageError(f"--awq {mode} needs an imatrix, which says how large each channel is")
    columns: dict[str, mx.array] = {}
    rows: dict[str, mx.array] = {}
    report = []
    has_mtp = recipe.options.mtp != "drop" and any(name.startswith(MTP_PREFIX) for name in source.specs)
    for group in groups(config, mtp=has_mtp):
        if group.letter not in letters:
            continue
        outcome, scales = _Trial(group, source, recipe, imatrix).run(mode)
        report.append(outcome)
        if scales is not None:
            rows[group.feeder] = scales
            columns |= dict.fromkeys(group.readers, group.expand(scales))
    if not any(group.changed for group in report):
        reasons = sorted({group.reason for group in report}) or ["the model has no such group"]
        raise UsageError(f"--awq {mode} changed nothing with {imatrix.path}: {'; '.join(reasons)}")
    return Folds(imatrix, columns, rows, tuple(report))


@dataclass(frozen=True)
class _Piece:
    """Some rows [R, K] of one matrix, and what goes with them; one piece stands for `weight` such pieces."""

    rows: mx.array
    importance: mx.array  # [1, K]
    expert: int | None
    geometry: Geometry
    weight: float

    def error(self, columns: mx.array) -> mx.array:
        """What rounding costs with these scales, [K] or [E, K]."""
        scales = columns if columns.ndim == 1 or self.expert is None else columns[self.expert]
        error = rounding_error(self.rows * scales, self.importance / mx.square(scales), self.geometry)
        return error * self.weight


class _Trial:
    """One group, tried with several scales."""

    def __init__(self, group: Group, source: Source, recipe: Recipe, imatrix: Imatrix):
        self.group, self.source, self.imatrix = group, source, imatrix
        decided = {name: recipe.decide(name, source.specs[name].shape) for name in group.readers}
        self.packed = {name: geometry for name, geometry in decided.items() if geometry is not None}
        self.pieces: list[_Piece] = []

    def run(self, mode: Mode) -> tuple[GroupReport, mx.array | None]:
        """The outcome, and the scales [S] or [E, S] if the group changes."""
        known = {name: self.imatrix.importance(name) for name in self.group.readers}
        measured = {name: importance for name, importance in known.items() if importance is not None}
        if not self.packed:
            return self._skipped("what it would help stays dense"), None
        if not self.packed.keys() <= measured.keys():
            return self._skipped("the imatrix does not know all of its matrices"), None
        self.pieces = [p for name in self.packed for p in self._pieces(name, measured[name])]
        # the first reader has its input from all tokens, as no single expert has
        importance = self.group.reduce(next(iter(measured.values())))
        before = self._error(mx.ones_like(importance))
        if mode == "fixed":
            tried = {1.0: self._exact(_published(importance))}
        else:
            tried = {alpha: self._exact(_limited(importance, alpha)) for alpha in ALPHAS}
        errors = {alpha: self._error(scales) for alpha, scales in tried.items()}
        best = min(errors, key=errors.__getitem__)
        if mode == "search" and errors[best] >= before:
            return self._skipped("no scaling made its error smaller", before), None
        return self._report(best, before, errors[best]), tried[best]

    def _pieces(self, name: str, importance: mx.array) -> Iterator[_Piece]:
        """Rows from all over the matrix, or from some of the experts."""
        count, *rest = self.source.specs[name].shape
        stacked = len(rest) == 2
        unit = 1 if stacked else FP8_BLOCK
        blocks = -(-count // unit)
        places = sorted({place * blocks // SAMPLE_PLACES for place in range(SAMPLE_PLACES)})
        for place in places:
            begin, end = place * unit, min(count, (place + 1) * unit)
            rows = dense(self.source.read(name, begin, end), mx.float32).reshape(-1, rest[-1])
            kept = rows[:: -(-rows.size * len(places) // SAMPLE_WEIGHTS)]
            mx.eval(kept)
            own = importance[begin] if importance.ndim == 2 else importance
            weight = blocks / len(places) * len(rows) / len(kept)
            yield _Piece(kept, own[None], begin if stacked else None, self.packed[name], weight)

    def _error(self, scales: mx.array) -> float:
        columns = self.group.expand(scales)
        total = 0.0
        for piece in self.pieces:
            total += float(piece.error(columns))
        return total

    def _exact(self, scales: mx.array) -> mx.array:
        """Nudged by at most one part in 256, so that a norm divided by them is a bfloat16 number."""
        if not self.group.norm:
            return scales
        norm = dense(self.source.read(self.group.feeder), mx.float32)
        folded = (norm / scales).astype(mx.bfloat16).astype(mx.float32)
        return mx.where(folded == 0, scales, norm / mx.where(folded == 0, 1.0, folded))

    def _skipped(self, reason: str, error: float = 0.0) -> GroupReport:
        return self._report(0.0, error, error, reason)

    def _report(self, alpha: float, before: float, after: float, reason: str = "") -> GroupReport:
        group = self.group
        return GroupReport(group.letter, group.layer, group.feeder, alpha, before, after, reason)


def _limited(importance: mx.array, alpha: float) -> mx.array:
    """importance^(alpha / 2) around a geometric mean of 1, within the limits; [S] or [E, S]."""
    logs = mx.log(_positive(importance)) * (alpha / 2)
    return mx.clip(mx.exp(logs - logs.mean(axis=-1, keepdims=True)), 1 / LIMIT, LIMIT)


def _published(importance: mx.array) -> mx.array:
    """sqrt(importance) / sqrt(max * min): what the published checkpoints' converter does; [S] or [E, S]."""
    roots = mx.sqrt(_positive(importance))
    return roots / mx.sqrt(roots.max(axis=-1, keepdims=True) * roots.min(axis=-1, keepdims=True))


def _positive(importance: mx.array) -> mx.array:
    """Raised to the floor, or to 1 where no channel was ever anything but 0."""
    mean = importance.mean(axis=-1, keepdims=True)
    return mx.where(mean > 0, mx.maximum(importance, FLOOR * mean), 1.0)
