"""Predicts the size and decoding speed of a conversion from `config.json` alone, without opening weights.

For each class of tensors: count, code, bytes, bits per weight, bytes read per token at an empty context.
`python -m qchat.core.quant.plan FOLDER...` prints the table of every published variant, as published.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX, Spec, body_specs, mtp_specs
from ..checkpoint.packed import Geometry
from ..checkpoint.vision import VisionConfig, vision_specs
from ..errors import ConfigError, QchatError, UsageError
from ..machine.files import read_json
from .recipe_file import RecipeFile
from .recipes import VARIANTS, Options, Recipe, check_parts
from .results import AllocationSummary, PlannedClass, PlanSummary

GB = 10**9
GIB = 1 << 30
DENSE_NBYTES = 2  # bfloat16
FLOAT32_NAMES = ("A_log", "dt_bias")  # a converter keeps these two in float32
HEADER_NBYTES = 200  # for one array in a safetensors header and in the index, rounded up generously
SMALL_FILES_NBYTES = 48 << 20  # tokenizer, template, configs, card
# by the last component of a module's name
CLASSES = {
    "embed_tokens": "embed",
    "lm_head": "lm_head",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention q/k/v"),
    "o_proj": "attention o",
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), "delta qkv/z"),
    **dict.fromkeys(("in_proj_a", "in_proj_b"), "delta a/b"),
    "out_proj": "delta out",
    **dict.fromkeys(("conv1d", "A_log", "dt_bias"), "conv and decay"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate/up"),
    "down_proj": "down",
    **dict.fromkeys(("gate", "shared_expert_gate"), "router"),
}
FEED_FORWARDS = {"mlp": "mlp", "switch_mlp": "experts", "shared_expert": "shared expert"}


@dataclass(frozen=True)
class Row:
    """The tensors of one class and code; `nbytes` are stored, `read_nbytes` read for each decoded token."""

    name: str
    mode: str
    tensors: int
    weights: int
    nbytes: int
    read_nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights

    def __add__(self, other: "Row") -> "Row":
        sums = (
            getattr(self, key) + getattr(other, key)
            for key in ("tensors", "weights", "nbytes", "read_nbytes")
        )
        return Row(self.name, self.mode, *sums)


@dataclass(frozen=True)
class Plan:
    """Every row of one model under one recipe. Plain decoding reads neither MTP head nor vision tower."""

    source: str
    options: Options
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def total(self) -> Row:
        return sum(self.rows, Row("total", "", 0, 0, 0, 0))

    @property
    def total_bytes(self) -> int:
        """The size of all tensors, without the headers of the shards."""
        return self.total.nbytes

    @property
    def disk_nbytes(self) -> int:
        """The disk space that must be free at the destination before writing starts."""
        arrays = 3 * self.total.tensors
        return self.total_bytes + arrays * HEADER_NBYTES + SMALL_FILES_NBYTES

    def tokens_per_s(self, bandwidth_gb_s: float) -> float:
        """Decoding speed if memory delivers `bandwidth_gb_s` * 10^9 bytes a second. Raises UsageError."""
        if not math.isfinite(bandwidth_gb_s) or bandwidth_gb_s <= 0:
            raise UsageError(f"--bandwidth is {bandwidth_gb_s:g}, wanted gigabytes per second above 0")
        return bandwidth_gb_s * GB / self.total.read_nbytes


def make_plan(config: ModelConfig, options: Options, table: RecipeFile | None = None) -> Plan:
    """The plan for a model of this config; `table` is that of `Recipe.build`.

    Raises UsageError and ConfigError.
    """
    recipe = Recipe.build(options, config, table)
    vision = vision_weights(config)
    check_parts(options, mtp=config.mtp_num_hidden_layers > 0, vision=vision is not None)
    specs = body_specs(config)
    if config.mtp_num_hidden_layers and options.mtp != "drop":
        specs |= mtp_specs(config)
    rows: dict[tuple[str, str], Row] = {}
    for name, spec in specs.items():
        row = _row(name, spec, recipe.decide(name, spec.shape), config)
        rows[row.name, row.mode] = rows[row.name, row.mode] + row if (row.name, row.mode) in rows else row
    classes = list(dict.fromkeys(name for name, _ in rows))
    ordered = sorted(rows.values(), key=lambda row: classes.index(row.name))
    if vision is not None and options.vision == "keep":
        tensors, weights = vision
        ordered.append(Row("vision", "bfloat16", tensors, weights, weights * DENSE_NBYTES, 0))
    return Plan(config.source, options, tuple(ordered), (*recipe.notes, *recipe.remarks))


def tensor_nbytes(name: str, shape: Sequence[int], geometry: Geometry | None) -> int:
    """The size of the canonical tensor `name` as a converter writes it, scales and biases included."""
    weights = math.prod(shape)
    if geometry is None:
        return weights * (4 if name.endswith(FLOAT32_NAMES) else DENSE_NBYTES)
    per_group = 2 * DENSE_NBYTES if geometry.mode == "affine" else 1
    return weights * geometry.bits // 8 + weights // geometry.group_size * per_group


def vision_weights(config: ModelConfig) -> tuple[int, int] | None:
    """The numbers of tensors and weights of the vision tower that `config` describes; None without one.

    Raises ConfigError.
    """
    tower = VisionConfig.of(config)
    if tower is None:
        return None
    shapes = vision_specs(tower).values()
    return len(shapes), sum(map(math.prod, shapes))


def _row(name: str, spec: Spec, geometry: Geometry | None, config: ModelConfig) -> Row:
    nbytes = tensor_nbytes(name, spec.shape, geometry)
    dense = "float32" if name.endswith(FLOAT32_NAMES) else "bfloat16"
    mode = dense if geometry is None else str(geometry)
    return Row(tensor_class(name), mode, 1, math.prod(spec.shape), nbytes, read_nbytes(name, nbytes, config))


def tensor_class(name: str) -> str:
    """The class of the canonical tensor `name`, as all tables call it."""
    if name.startswith(MTP_PREFIX):
        return "mtp"
    *_, parent, last = f".{name}".split(".")
    kind = CLASSES.get(last, "norms")
    return f"{FEED_FORWARDS[parent]} {kind}" if kind in ("gate/up", "down") else kind


def read_nbytes(name: str, nbytes: int, config: ModelConfig) -> int:
    """Bytes read per token: only the routed experts, and one row of an embedding unless it is the head."""
    if name.startswith(MTP_PREFIX):
        return 0
    if ".switch_mlp." in name:
        return nbytes * config.num_experts_per_tok // config.num_experts
    if name == "embed_tokens" and not config.tie_word_embeddings:
        return nbytes // config.vocab_size
    return nbytes


def summarize(
    plan: Plan,
    bandwidth_gb_s: float | None = None,
    allocation: AllocationSummary | None = None,
    predicted_kl: float | None = None,
) -> PlanSummary:
    """Return the plan's figures, with the speed at this memory bandwidth. Raises UsageError for a bad one.

    The KL divergence is that of the allocation, if there is one.
    """
    speed = None if bandwidth_gb_s is None else plan.tokens_per_s(bandwidth_gb_s)
    return PlanSummary(
        source=plan.source,
        options=vars(plan.options),
        total_bytes=plan.total_bytes,
        bits_per_weight=plan.total.bits_per_weight,
        bytes_per_token=plan.total.read_nbytes,
        disk_bytes=plan.disk_nbytes,
        classes=tuple(PlannedClass(**vars(row), bits_per_weight=row.bits_per_weight) for row in plan.rows),
        notes=plan.notes,
        bandwidth_gb_s=bandwidth_gb_s,
        tokens_per_s=speed,
        predicted_kl=allocation.predicted_kl if allocation else predicted_kl,
        allocation=allocation,
    )


def as_json(
    plan: Plan,
    bandwidth_gb_s: float | None = None,
    allocation: AllocationSummary | None = None,
    predicted_kl: float | None = None,
) -> dict[str, Any]:
    """Return `summarize` as values that `json.dumps` takes, without what is unknown."""
    fields = asdict(summarize(plan, bandwidth_gb_s, allocation, predicted_kl))
    return {key: value for key, value in fields.items() if value is not None}


def plan_variants(config: ModelConfig, *, as_published: bool) -> dict[str, Plan]:
    """A plan for each published variant, with our defaults or `as_published` (`keep_bf16`, no MTP head)."""
    published: dict[str, Any] = {"keep_bf16": True}
    if config.mtp_num_hidden_layers:
        published["mtp"] = "drop"
    changes = published if as_published else {}
    return {name: make_plan(config, replace(options, **changes)) for name, options in VARIANTS.items()}


def as_variants_table(plans: Mapping[str, Mapping[str, Plan]]) -> str:
    """The variants of several models as a table, by model and variant name."""
    lines = [f"{'model':<24}{'variant':<14}{'GB':>9}{'GiB':>9}{'bits/weight':>13}{'GB/token':>10}"]
    for model, variants in plans.items():
        for name, plan in variants.items():
            total = plan.total
            lines.append(
                f"{model:<24}{name:<14}{total.nbytes / GB:>9.2f}{total.nbytes / GIB:>9.2f}"
                f"{total.bits_per_weight:>13.2f}{total.read_nbytes / GB:>10.2f}"
            )
    return "\n".join(lines)


def load_config(path: Path) -> ModelConfig:
    """The config in a model folder, or in a single config file. Raises ModelError."""
    if path.is_dir() or not path.exists():
        return ModelConfig.load(path)
    return ModelConfig.parse(read_json(path, ConfigError), str(path))


def main(arguments: Sequence[str]) -> int:
    """Print every variant of the models at these paths, as published, and return the exit code."""
    try:
        if not arguments:
            raise UsageError("wanted model folders or config.json files")
        configs = {path.name.removesuffix(".config.json"): load_config(path) for path in map(Path, arguments)}
        plans = {name: plan_variants(config, as_published=True) for name, config in configs.items()}
    except QchatError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    print(as_variants_table(plans))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
