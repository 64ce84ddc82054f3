"""Activation-aware scaling: chooses which channels of a group of matrices to enlarge before rounding.

Lin et al., "AWQ" (arXiv 2306.00978): s = E[x^2]^(alpha / 2), with alpha searched per group. Owns the groups
of this architecture, whose scaling leaves the model unchanged. Groups of float codes change only where their
measured error falls. Refuses an imatrix that changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX
from ..checkpoint.packed import Geometry
from ..errors import UsageError
from ..machine.backend import mx
from ..quant.folds import Folds
from ..quant.imatrix import Imatrix
from ..quant.recipe_file import RoundingMethod
from ..quant.recipes import Recipe
from ..quant.results import GroupReport
from ..quant.rounding import rounding_error
from .source import FP8_BLOCK, Source, to_dense

ScalingMode = Literal["off", "fixed", "search"]
GROUPS = "ABCDEF"
# the groups that did not make the model worse in measurements (core/BENCHMARKS.md)
DEFAULT_GROUPS = "AB"
ALPHAS = tuple(step / 10 for step in range(1, 11))
LIMIT = 16.0  # on a searched scale and its inverse, around the geometric mean
FLOOR = 1e-8  # as a share of the mean importance, so that a channel that was always 0 has a scale
# of whole rows from places spread over each matrix
SAMPLE_WEIGHTS, SAMPLE_PLACES = 1 << 20, 8


@dataclass(frozen=True)
class Group:
    """Matrices that read the same input (`readers`), and the tensor that produces this input (`feeder`).

    The input has `blocks` x `repeats` x C channels, and repeats share a scale. If `stacked`, each expert has
    its own scales. If `norm`, the feeder is a norm.
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
        """Average the importance [K] or [E, K] over the channels that share a scale: [S] or [E, S]."""
        if importance.ndim > 1 and not self.stacked:
            importance = importance.mean(axis=0)
        lead = importance.shape[:-1]
        return importance.reshape(*lead, self.blocks, self.repeats, -1).mean(axis=-2).reshape(*lead, -1)

    def expand(self, scales: mx.array) -> mx.array:
        """Repeat scales [S] or [E, S] for all input channels: [K] or [E, K]."""
        lead = scales.shape[:-1]
        parts = scales.reshape(*lead, self.blocks, 1, -1)
        return mx.repeat(parts, self.repeats, axis=-2).reshape(*lead, -1)


def groups(config: ModelConfig, *, mtp: bool) -> Iterator[Group]:
    """Every group of the model, layer by layer, including the MTP head's if `mtp`.

    The group of a norm holds every matrix that reads the norm; otherwise the model would change. The two
    input norms of the MTP head and the final norm, which feeds both heads, are in no group.
    """
    layers = [(f"layers.{layer}", kind) for layer, kind in enumerate(config.layer_types)]
    if mtp:
        layers.append((f"{MTP_PREFIX}layers.0", "full_attention"))
    for layer, kind in layers:
        yield from _attention(layer, config) if kind == "full_attention" else _delta_net(layer, config)
        yield from _experts(layer) if config.is_moe else _dense(layer)


def _names(layer: str, module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{layer}.{module}.{name}" for name in names)


def _attention(layer: str, config: ModelConfig) -> Iterator[Group]:
    readers = _names(layer, "self_attn", "q_proj", "k_proj", "v_proj")
    yield Group("C", layer, readers, f"{layer}.input_layernorm", norm=True)
    output, values = _names(layer, "self_attn", "o_proj", "v_proj")
    kv_heads = config.num_key_value_heads
    shared = config.num_attention_heads // kv_heads  # query heads that read the same value head are adjacent
    yield Group("E", layer, (output,), values, blocks=kv_heads, repeats=shared)


def _delta_net(layer: str, config: ModelConfig) -> Iterator[Group]:
    readers = _names(layer, "linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")
    yield Group("D", layer, readers, f"{layer}.input_layernorm", norm=True)
    output, norm = _names(layer, "linear_attn", "out_proj", "norm")
    yield Group("F", layer, (output,), norm, norm=True, repeats=config.linear_num_value_heads)


def _dense(layer: str) -> Iterator[Group]:
    gate, up, down = _names(layer, "mlp", "gate_proj", "up_proj", "down_proj")
    yield Group("A", layer, (gate, up), f"{layer}.post_attention_layernorm", norm=True)
    yield Group("B", layer, (down,), up)


def _experts(layer: str) -> Iterator[Group]:
    gates = _names(layer, "mlp", "gate", "shared_expert_gate")
    shared = _names(layer, "mlp.shared_expert", "gate_proj", "up_proj", "down_proj")
    experts = _names(layer, "mlp.switch_mlp", "gate_proj", "up_proj", "down_proj")
    readers = (*gates, *shared[:2], *experts[:2])
    yield Group("A", layer, readers, f"{layer}.post_attention_layernorm", norm=True)
    yield Group("B", layer, experts[2:], experts[1], stacked=True)
    yield Group("B", layer, shared[2:], shared[1])


def search_scales(
    source: Source,
    config: ModelConfig,
    recipe: Recipe,
    imatrix: Imatrix | None,
    mode: ScalingMode = "search",
    letters: str = DEFAULT_GROUPS,
    method: RoundingMethod | None = None,
) -> Folds:
    """Find the scales for the tensors of `source`, reading a few rows of each, one group after the other.

    Mode "fixed" is alpha 1 everywhere, without limits; `letters` are the groups to consider. Raises
    UsageError without an imatrix, and if no group changes.
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
        outcome, scales = _Trial(group, source, recipe, imatrix, method).run(mode)
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
    """Sampled rows [R, K] of one matrix, with their numbers; it represents `weight` pieces of its size."""

    rows: mx.array
    numbers: mx.array
    importance: mx.array  # [1, K]
    expert: int | None
    geometry: Geometry
    weight: float

    def own(self, scales: mx.array) -> mx.array:
        """The scales of this piece, of scales for all experts."""
        return scales if scales.ndim == 1 or self.expert is None else scales[self.expert]

    def error(self, columns: mx.array, method: RoundingMethod | None) -> mx.array:
        """The rounding error with these scales of the columns, [K] or [E, K]."""
        scales = self.own(columns)
        importance = self.importance / mx.square(scales)
        return rounding_error(self.rows * scales, importance, self.geometry, method) * self.weight

    def feeding_error(self, scales: mx.array, costs: mx.array, method: RoundingMethod | None) -> mx.array:
        """The error with rows divided by these scales, [N] or [E, N].

        `costs` says what the same relative error of each row costs where it is read.
        """
        divisors = self.own(scales)[self.numbers][:, None]
        energy = (self.importance * mx.square(self.rows)).sum(axis=-1, keepdims=True)
        cost = mx.where(energy > 0, self.own(costs)[self.numbers][:, None] / energy, 0.0)
        importance = self.importance * cost * mx.square(divisors)
        return rounding_error(self.rows / divisors, importance, self.geometry, method) * self.weight


class _Trial:
    """Tries one group with several scales."""

    def __init__(
        self,
        group: Group,
        source: Source,
        recipe: Recipe,
        imatrix: Imatrix,
        method: RoundingMethod | None = None,
    ):
        self.group, self.source, self.imatrix = group, source, imatrix
        self.method: RoundingMethod | None = method
        decided = {name: recipe.decide(name, source.specs[name].shape) for name in group.readers}
        self.packed = {name: geometry for name, geometry in decided.items() if geometry is not None}
        self.pieces: list[_Piece] = []
        feeder = recipe.decide(group.feeder, source.specs[group.feeder].shape)
        # the scales of affine codes follow the rows; those of float codes are too coarse for that
        self.feeder = feeder if group.letter == "B" and feeder and feeder.mode != "affine" else None
        self.feeding: list[_Piece] = []
        self.costs = mx.array(0.0)

    def run(self, mode: ScalingMode) -> tuple[GroupReport, mx.array | None]:
        """The report of the group, and its scales [S] or [E, S], or None if it stays unchanged."""
        known = {name: self.imatrix.importance(name) for name in self.group.readers}
        measured = {name: importance for name, importance in known.items() if importance is not None}
        if not self.packed:
            return self._skip("its matrices stay dense"), None
        if not self.packed.keys() <= measured.keys():
            return self._skip("the imatrix does not know all of its matrices"), None
        for name, code in self.packed.items():
            self.pieces += self._pieces(name, code, measured[name])
        # the first reader sees all tokens, as no single expert does
        first = next(iter(measured.values()))
        self._look_at_feeder(first)
        importance = self.group.reduce(first)
        before = self._error(mx.ones_like(importance))
        if mode == "fixed":
            tried = {1.0: self._adjust_to_norm(_published_scales(importance))}
        else:
            tried = {alpha: self._adjust_to_norm(_limit_scales(importance, alpha)) for alpha in ALPHAS}
        errors = {alpha: self._error(scales) for alpha, scales in tried.items()}
        best = min(errors, key=errors.__getitem__)
        if errors[best] >= before and (mode == "search" or self._is_float):
            return self._skip("no scaling reduced its error", before), None
        return self._report(best, before, errors[best]), tried[best]

    @property
    def _is_float(self) -> bool:
        return bool(self.feeder) or any(code.mode != "affine" for code in self.packed.values())

    def _look_at_feeder(self, importance: mx.array) -> None:
        """Sample the feeder, if its rows are rounded worse with some scales than with others.

        `importance` [K] or [E, K] is that of the feeder's outputs once they are gated, where they are read.
        """
        known = None if self.feeder is None else self.imatrix.importance(self.group.feeder)
        if known is None or self.feeder is None:
            return
        self.feeding = list(self._pieces(self.group.feeder, self.feeder, known))
        energies = mx.zeros_like(importance)  # of the columns that read them
        for piece in self.pieces:
            energy = mx.square(piece.rows).sum(axis=0) * piece.weight
            energies = energies.at[... if importance.ndim == 1 else piece.expert].add(energy)
        self.costs = importance * energies

    def _pieces(self, name: str, code: Geometry, importance: mx.array) -> Iterator[_Piece]:
        """Sample rows from all over the matrix, or from some of the experts."""
        count, *rest = self.source.specs[name].shape
        stacked = len(rest) == 2
        unit = 1 if stacked else FP8_BLOCK
        blocks = -(-count // unit)
        places = sorted({place * blocks // SAMPLE_PLACES for place in range(SAMPLE_PLACES)})
        for place in places:
            begin, end = place * unit, min(count, (place + 1) * unit)
            rows = to_dense(self.source.read(name, begin, end), mx.float32).reshape(-1, rest[-1])
            step = -(-rows.size * len(places) // SAMPLE_WEIGHTS)
            numbers = mx.arange(0 if stacked else begin, len(rows) + (0 if stacked else begin), step)
            kept = rows[::step]
            mx.eval(kept)
            own = importance[begin] if importance.ndim == 2 else importance
            weight = blocks / len(places) * len(rows) / len(kept)
            yield _Piece(kept, numbers, own[None], begin if stacked else None, code, weight)

    def _error(self, scales: mx.array) -> float:
        columns = self.group.expand(scales)
        errors = [piece.error(columns, self.method) for piece in self.pieces]
        errors += [piece.feeding_error(scales, self.costs, self.method) for piece in self.feeding]
        total = 0.0
        for error in errors:
            total += float(error)
        return total

    def _adjust_to_norm(self, scales: mx.array) -> mx.array:
        """Adjust scales by at most one part in 256 so that the norm divided by them is exact in bfloat16."""
        if not self.group.norm:
            return scales
        norm = to_dense(self.source.read(self.group.feeder), mx.float32)
        folded = (norm / scales).astype(mx.bfloat16).astype(mx.float32)
        return mx.where(folded == 0, scales, norm / mx.where(folded == 0, 1.0, folded))

    def _skip(self, reason: str, error: float = 0.0) -> GroupReport:
        return self._report(0.0, error, error, reason)

    def _report(self, alpha: float, before: float, after: float, reason: str = "") -> GroupReport:
        group = self.group
        return GroupReport(group.letter, group.layer, group.feeder, alpha, before, after, reason)


def _limit_scales(importance: mx.array, alpha: float) -> mx.array:
    """importance^(alpha / 2) with a geometric mean of 1, clipped to the limits; [S] or [E, S]."""
    logs = mx.log(_raise_to_floor(importance)) * (alpha / 2)
    return mx.clip(mx.exp(logs - logs.mean(axis=-1, keepdims=True)), 1 / LIMIT, LIMIT)


def _published_scales(importance: mx.array) -> mx.array:
    """sqrt(importance) / sqrt(max * min), as the published checkpoints' converter has it; [S] or [E, S]."""
    roots = mx.sqrt(_raise_to_floor(importance))
    return roots / mx.sqrt(roots.max(axis=-1, keepdims=True) * roots.min(axis=-1, keepdims=True))


def _raise_to_floor(importance: mx.array) -> mx.array:
    """Raise importances to the floor, or to 1 if every channel was always 0."""
    mean = importance.mean(axis=-1, keepdims=True)
    return mx.where(mean > 0, mx.maximum(importance, FLOOR * mean), 1.0)
