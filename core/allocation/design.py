"""Which matrices are measured together, with which codes, over how many tokens.

Small models are measured matrix by matrix. In large ones the matrices of one class in a block of layers
share a measurement, and its codes and tokens are fewer, so that the work stays bounded. Routers, gates,
in_proj_a and in_proj_b, and the MTP head keep the code that every recipe gives them.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import Spec, body_specs
from ..checkpoint.packed import Geometry

PINNED_NAMES = ("mlp.gate", "mlp.shared_expert_gate", "in_proj_a", "in_proj_b")
LAYER = re.compile(r"layers\.(\d+)\.(.+)")
MAX_FLOPS = 3e14  # about an hour on two CPU cores, half a minute on a large GPU
EMBEDDING, HEAD = "embed_tokens", "lm_head"


@dataclass(frozen=True)
class Detail:
    """How finely a model is measured: `windows` of `length` tokens, layers cut into `blocks` (0: each alone).

    `codes` are (bits, group) of the affine codes that are measured; the error law gives the others.
    """

    windows: int
    length: int
    blocks: int
    codes: tuple[tuple[int, int], ...]


ALL_CODES = ((2, 64), (3, 128), (3, 64), (3, 32), (4, 64))
FEW_CODES = ((2, 64), (3, 64), (4, 64))
DETAILS = (
    Detail(4, 384, 0, ALL_CODES),
    Detail(2, 256, 0, FEW_CODES),
    Detail(1, 256, 16, FEW_CODES),
    Detail(1, 256, 8, FEW_CODES),
)


@dataclass(frozen=True)
class Group:
    """Matrices that are measured together and get the same code; `layers` are those that hold them.

    The embedding and the output head belong to no layer.
    """

    tensors: tuple[str, ...]
    codes: tuple[Geometry, ...]
    layers: tuple[int, ...]


def choose_detail(config: ModelConfig) -> Detail:
    """Return the finest detail whose work is bounded, or else the coarsest."""
    weights = sum(math.prod(spec.shape) for spec in body_specs(config).values())
    active = weights
    if config.is_moe:
        experts = [s for name, s in body_specs(config).items() if ".switch_mlp." in name]
        routed = sum(math.prod(spec.shape) for spec in experts)
        active = weights - routed + routed * config.num_experts_per_tok // config.num_experts
    return next((d for d in DETAILS if _flops(config, d, active) <= MAX_FLOPS), DETAILS[-1])


def _flops(config: ModelConfig, detail: Detail, active: int) -> float:
    """Estimate the work: each variant passes half of the layers on average."""
    variants = sum(len(group.codes) for group in measured_groups(config, detail))
    return variants * detail.windows * detail.length * active


def measured_groups(config: ModelConfig, detail: Detail) -> list[Group]:
    """Return the groups of all matrices whose code is to be chosen, embedding and output head included."""
    members: dict[tuple[str, int], list[str]] = {}
    specs = body_specs(config)
    for name, spec in specs.items():
        if is_chosen(name, spec):
            match = LAYER.fullmatch(name)
            layer, kind = (int(match[1]), match[2]) if match else (0, name)
            block = layer * detail.blocks // config.num_hidden_layers if detail.blocks else layer
            members.setdefault((kind, block), []).append(name)
    return [_group(names, specs, detail) for names in members.values()]


def is_chosen(name: str, spec: Spec) -> bool:
    """Whether the code of the tensor `name` is a matter of choice."""
    return spec.kind == "matrix" and spec.shape[-1] % 32 == 0 and not name.endswith(PINNED_NAMES)


def _group(names: Sequence[str], specs: Mapping[str, Spec], detail: Detail) -> Group:
    width = specs[names[0]].shape[-1]
    codes = dict.fromkeys(fitting(width, bits, group) for bits, group in detail.codes)
    return Group(tuple(names), tuple(codes), tuple(sorted(set(_layers(names)))))


def fitting(width: int, bits: int, group: int) -> Geometry:
    """Return the affine code whose group is the largest up to `group` that divides rows of `width`."""
    while width % group:
        group //= 2
    return Geometry(bits, group, "affine")


def _layers(names: Sequence[str]) -> Iterator[int]:
    return (int(match[1]) for match in map(LAYER.fullmatch, names) if match)
