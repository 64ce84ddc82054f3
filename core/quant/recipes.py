"""Decides what each matrix of a model becomes, by a recipe, the flags that modify it, and fixed rules.

Routers and shared-expert gates are affine 8-bit group 64, as is the MTP head unless a rule names it. Rows
that are not a multiple of their group stay dense. Refuses flags that contradict each other or would change
nothing.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX, body_specs, mtp_specs
from ..checkpoint.packed import AFFINE_BITS, AFFINE_GROUPS, FLOAT_MODES, Geometry, Mode
from ..errors import UsageError
from .recipe_file import BEST, FLOAT_MAP, RecipeFile, Rule, read_recipe

MTPChoice = Literal["keep", "drop", "split"]
VisionChoice = Literal["keep", "drop"]
PINNED = Geometry(8, 64, "affine")
FLOATS = {mode: Geometry(bits, group, mode) for (bits, group), mode in FLOAT_MODES.items()}
FLOAT_BY_BITS = {4: FLOATS["mxfp4"], 8: FLOATS["mxfp8"]}
ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")
TABLES = ("embed_tokens", "lm_head")
KEEP_BF16_NAMES = ("o_proj", "out_proj", "in_proj_a", "in_proj_b")
LAYER = re.compile(r"layers\.(\d+)\.")
FLAGS = {
    "bits": "--q-bits",
    "group_size": "--q-group-size",
    "mode": "--q-mode",
    "mxfp": "--q-mxfp",
    "keep_bf16": "--keep-bf16",
}
CARDS_REMARK = (
    "o_proj, out_proj, in_proj_a and in_proj_b get 8 bits, which measured no loss; the published cards leave "
    "them in bfloat16, as --keep-bf16 does"
)
MXFP8_REMARK = "mxfp8 costs about four times the KL divergence of 6 affine bits, which take less space"
# why a flag has no effect
WHY_IDLE = {
    "bits": "gives no matrix of this model bits relative to N",
    "group_size": "gives no matrix of this model a group that is not its own",
    "mode": "gives no matrix of this model so many bits",
    "mxfp": "gives 4 or 8 bits to no matrix but embedding, head, routers and MTP head",
    "keep_bf16": f"keeps {', '.join(KEEP_BF16_NAMES)} already",
}


@dataclass(frozen=True)
class Options:
    """The options of a conversion, as on the command line.

    recipe: a built-in name or the path of a TOML file. bits: the base N; None means the default of the recipe
    or the mode. group_size: for affine rules without their own; None means the recipe's. mode: the code for
    all decisions with that code's number of bits. mxfp: use mxfp4 and mxfp8 for 4- and 8-bit decisions,
    except for embedding and head. float_map: unsloth's fixed map, with mxfp or mode nvfp4. keep_bf16: keep
    o_proj, out_proj, in_proj_a and in_proj_b of the body dense.
    """

    recipe: str = "none"
    bits: int | None = None
    group_size: int | None = None
    mode: Mode = "affine"
    mxfp: bool = False
    float_map: bool = False
    keep_bf16: bool = False
    mtp: MTPChoice = "keep"
    vision: VisionChoice = "keep"


def _unsloth(bits: int | None = None, *, mxfp: bool = False, mode: Mode = "affine") -> Options:
    return Options(recipe="unsloth", bits=bits, mxfp=mxfp, mode=mode)


# the published names; their first generation also used `keep_bf16` and dropped the MTP head
VARIANTS: Mapping[str, Options] = {
    "UD-Q2_K_XL": _unsloth(2),
    "UD-Q3_K_XL": _unsloth(3),
    "NVFP4_K_XL": _unsloth(mode="nvfp4"),
    "MXFP4_K_XL": _unsloth(4, mxfp=True),
    "UD-Q4_K_XL": _unsloth(4),
    "UD-Q5_K_XL": _unsloth(5),
    "UD-Q6_K_XL": _unsloth(6),
    "MXFP8_K_XL": _unsloth(8, mxfp=True),
    "UD-Q8_K_XL": _unsloth(8),
}


@dataclass(frozen=True)
class Recipe:
    """The decisions for one model; `base` is N, `shapes` has every matrix, MTP head included."""

    options: Options
    table: RecipeFile
    base: int
    group_size: int
    layers: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @classmethod
    def build(cls, options: Options, config: ModelConfig, table: RecipeFile | None = None) -> "Recipe":
        """Read the recipe and check every flag against it and `config`. Raises UsageError.

        `table` is the recipe itself where it was made for this model.
        """
        check_options(options)
        recipe = cls._make(options, config, table)
        _refuse_idle(recipe, config)
        return recipe

    @classmethod
    def _make(cls, options: Options, config: ModelConfig, table: RecipeFile | None = None) -> "Recipe":
        if table is None:
            table = read_recipe(FLOAT_MAP if options.float_map else options.recipe)
        implied = table.default_bits if options.mode == "affine" else FLOATS[options.mode].bits
        specs = body_specs(config) | mtp_specs(config)
        return cls(
            options=options,
            table=table,
            base=options.bits or implied,
            group_size=options.group_size or table.group_size,
            layers=config.num_hidden_layers,
            shapes={name: spec.shape for name, spec in specs.items() if spec.kind == "matrix"},
        )

    @property
    def default(self) -> Geometry:
        """The triple of the base N, for the top level of the quantization object in `config.json`."""
        return self._apply_flags("", Geometry(self.base, self.group_size, "affine"))

    @cached_property
    def decisions(self) -> Mapping[str, Geometry | None]:
        """The decision for every matrix of the model, by canonical name."""
        return {name: self.decide(name, shape) for name, shape in self.shapes.items()}

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Sentences about matrices that cannot be packed as the recipe says, and rules without effect."""
        return (*self._misfits(), *self._idle_rules())

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """Sentences about codes that differ from those of the published cards, or that others beat."""
        return tuple(self._remarks())

    def decide(self, name: str, shape: tuple[int, ...]) -> Geometry | None:
        """The triple of the canonical module `name`, a matrix of `shape` [..., N, K]; None if it stays dense.

        Also None for anything but a matrix of this model (norms, convolutions, the vision tower), and if K is
        not a multiple of the group. A tied embedding is decided by its own name.
        """
        wanted = self._decide_by_rules(name) if name in self.shapes else None
        return wanted if wanted is not None and _fits(wanted, shape) else None

    def _decide_by_rules(self, name: str) -> Geometry | None:
        """The decision regardless of the shape."""
        mtp = name.startswith(MTP_PREFIX)
        if name.endswith(ROUTERS):
            return None if self.table.routers_dense else PINNED
        if self.options.keep_bf16 and not mtp and name.endswith(KEEP_BF16_NAMES):
            return None
        rule = self._rule(name)
        if rule is None:
            return PINNED
        if rule.bits is None:
            return None
        return self._apply_flags(name, self._geometry(rule, rule.bits.at(self.base)))

    def _rule(self, name: str) -> Rule | None:
        """The first rule that matches; for the MTP head there may be none."""
        match = LAYER.match(name)
        layer = int(match[1]) if match else None
        return next((rule for rule in self.table.rules if rule.matches(name, layer, self.layers)), None)

    def _geometry(self, rule: Rule, bits: int) -> Geometry:
        if rule.mode == "affine":
            return Geometry(bits, rule.group_size or self.group_size, "affine")
        if rule.mode == "float":
            return FLOATS["nvfp4"] if bits == 4 and self.options.mode == "nvfp4" else FLOAT_BY_BITS[bits]
        return FLOATS[rule.mode]

    def _apply_flags(self, name: str, geometry: Geometry) -> Geometry:
        """Apply the flags to a decision; floating-point codes stay as the rule has them."""
        options = self.options
        if geometry.mode != "affine":
            return geometry
        if options.mode != "affine" and FLOATS[options.mode].bits == geometry.bits:
            return FLOATS[options.mode]
        promoted = FLOAT_BY_BITS.get(geometry.bits, geometry)
        return promoted if options.mxfp and name not in TABLES else geometry

    def _misfits(self) -> list[str]:
        """One sentence for each row length and triple, however many matrices share them."""
        names: dict[tuple[int, Geometry], list[str]] = {}
        for name, shape in self.shapes.items():
            wanted = self._decide_by_rules(name)
            if wanted is not None and not _fits(wanted, shape):
                names.setdefault((shape[-1], wanted), []).append(name)
        return [
            f"{shared[0]}{f' and {len(shared) - 1} more' if len(shared) > 1 else ''} kept dense: "
            f"rows of {width} are not a multiple of the group of {wanted}"
            for (width, wanted), shared in names.items()
        ]

    def _idle_rules(self) -> list[str]:
        """Sentences about rules without effect, but not for built-in recipes, which serve many models."""
        if self.table.is_builtin:
            return []
        used = {id(self._rule(name)) for name in self.shapes if not name.endswith(ROUTERS)}
        return [
            f"the recipe {self.table.name} has a rule that decides no module of this model: {rule}"
            for rule in self.table.rules
            if id(rule) not in used
        ]

    def _remarks(self) -> Iterator[str]:
        if self.table.name == "unsloth" and not self.options.keep_bf16:
            yield CARDS_REMARK
        if any(code == FLOATS["mxfp8"] for code in self.decisions.values()):
            yield MXFP8_REMARK


def check_parts(options: Options, *, mtp: bool, vision: bool) -> None:
    """Raise UsageError for an option about a part that the model does not have."""
    if options.mtp != "keep" and not mtp:
        raise UsageError(f"--mtp {options.mtp} would change nothing: the model has no MTP head")
    if options.vision != "keep" and not vision:
        raise UsageError(f"--vision {options.vision} would change nothing: the model has no vision tower")


def check_options(options: Options) -> None:
    """Raise UsageError for values that no model has, and for flags that contradict each other."""
    _check_values(options)
    _check_together(options)


def _fits(geometry: Geometry, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[-1] % geometry.group_size == 0


def _check_values(options: Options) -> None:
    allowed = {
        "bits": (*AFFINE_BITS, None),
        "group_size": (*AFFINE_GROUPS, None),
        "mode": get_args(Mode),
        "mtp": get_args(MTPChoice),
        "vision": get_args(VisionChoice),
    }
    for name, values in allowed.items():
        value = getattr(options, name)
        if value not in values:
            wanted = ", ".join(str(known) for known in values if known is not None)
            raise UsageError(f"{FLAGS.get(name, f'--{name}')} is {value!r}, wanted one of {wanted}")


def _check_together(options: Options) -> None:
    """Raise UsageError for flags that contradict each other."""
    if options.mode != "affine":
        own = FLOATS[options.mode].bits
        if options.mxfp:
            raise UsageError(
                f"--q-mxfp and --q-mode {options.mode} are two ways to choose a float code: give one"
            )
        if options.bits not in (None, own):
            raise UsageError(
                f"--q-mode {options.mode} has {own} bits: --q-bits {options.bits} contradicts it"
            )
    if options.recipe == BEST:
        for name in ("bits", "group_size", "mode", "mxfp"):
            if getattr(options, name) not in (None, False, "affine"):
                raise UsageError(f"{FLAGS[name]} contradicts the recipe best, which chooses bits by itself")
    if options.float_map:
        if options.recipe != "unsloth":
            raise UsageError(
                f"--float-map is a map of the recipe unsloth, and the recipe is {options.recipe}"
            )
        if not options.mxfp and options.mode != "nvfp4":
            raise UsageError("--float-map needs --q-mxfp or --q-mode nvfp4, which names its 4-bit code")


def _refuse_idle(recipe: Recipe, config: ModelConfig) -> None:
    """Raise UsageError for a flag that changes no decision."""
    options = recipe.options
    # with the float map these two choose its 4-bit code, even if no rule has 4 bits
    chosen = () if options.float_map else ("mode", "mxfp")
    for name in ("bits", "group_size", *chosen, "keep_bf16"):
        if getattr(options, name) in (None, False, "affine"):
            continue
        table = recipe.table if options.recipe == BEST else None
        others = [Recipe._make(other, config, table) for other in _alternatives(options, name)]
        if all(other.decisions == recipe.decisions for other in others):
            value = getattr(options, name)
            flag = FLAGS[name] if value is True else f"{FLAGS[name]} {value}"
            what = "--float-map" if options.float_map else f"the recipe {options.recipe}"
            raise UsageError(f"{flag} would change nothing: {what} {WHY_IDLE[name]}")


def _alternatives(options: Options, name: str) -> list[Options]:
    """The same options without the flag, or with every other value of a flag that always has one."""
    if name == "bits":
        plain = options if options.float_map else replace(options, mode="affine")
        return [replace(plain, bits=bits) for bits in AFFINE_BITS]
    if name == "group_size":
        return [replace(options, group_size=group) for group in AFFINE_GROUPS]
    if name == "mode":
        return [replace(options, mode="affine", bits=FLOATS[options.mode].bits)]
    return [replace(options, **{name: False})]
