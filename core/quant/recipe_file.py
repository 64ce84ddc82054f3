"""The recipe format: a TOML file of ordered rules from patterns of module names to bits, group size and mode.

`default_bits`, `group_size`, `routers` and `rounding` come first, then `[[rule]]` tables, the last for `*`:
  match = "*.down_proj" or a list; patterns that begin with `mtp.`, and only they, match the MTP head
  bits = 4, "N", "N+1"; or mode = "mxfp4", "mxfp8", "nvfp4", "float" (mxfp, or the flags'); or dense = true
  group_size = 32; layers = "first 4", "last 1/8", "every 3 after 1/8" or a list
`rounding` is "nearest", "weighted" or "gptq", unless the command line says another one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from ..checkpoint.packed import AFFINE_BITS, AFFINE_GROUPS, FLOAT_MODES
from ..errors import UsageError
from ..machine.files import parse_toml, read_text
from ..quoting import quote_value

BUILTIN_FOLDER = Path(__file__).parent / "builtin"
BUILTIN = ("unsloth", "qwen3_5", "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6", "none")
FLOAT_MAP = "float_map"
BEST = "best"  # made for one model and one budget by `allocation`; no file has it
MAX_FILE_NBYTES = 1 << 20
MAX_RULES = 1000
FILE_KEYS = ("default_bits", "group_size", "routers", "rounding", "rule")
RULE_KEYS = ("match", "layers", "bits", "group_size", "mode", "dense")
FLOAT_BITS = {mode: bits for (bits, _), mode in FLOAT_MODES.items()}
RELATIVE_BITS = re.compile(r"N(?: *([+-]) *(\d))?")
SHARE = r"(\d{1,4})(?:/([1-9]\d{0,3}))?"
LAYER_WORDS = re.compile(rf"(first|last) {SHARE}|every ([1-9]\d{{0,3}}) after {SHARE}")
RuleMode = Literal["affine", "mxfp4", "mxfp8", "nvfp4", "float"]
RoundingMethod = Literal["nearest", "weighted", "gptq"]


@dataclass(frozen=True)
class Bits:
    """A number of bits, absolute or relative to the base N of the command line."""

    number: int
    relative: bool

    def at(self, base: int) -> int:
        """The smallest number of bits that MLX packs and that suffices for this base; at most 8."""
        wanted = base + self.number if self.relative else self.number
        return next((bits for bits in AFFINE_BITS if bits >= wanted), AFFINE_BITS[-1])


@dataclass(frozen=True)
class Layers:
    """A selection of layers: the `first` or `last` share, or `every` step-th layer after a first share.

    A share is (1, 8) for an eighth of all layers, rounded down, or (4, 0) for four layers.
    """

    kind: str
    share: tuple[int, int]
    step: int = 0

    def holds(self, layer: int, layers: int) -> bool:
        amount, whole = self.share
        count = layers * amount // whole if whole else amount
        if self.kind == "first":
            return layer < count
        if self.kind == "last":
            return layer >= layers - count
        return layer >= count and (layer - count) % self.step == self.step - 1


@dataclass(frozen=True)
class Rule:
    """A decision for the modules that match a pattern; without `bits` they stay dense."""

    patterns: tuple[str, ...]
    layers: tuple[Layers, ...]
    bits: Bits | None
    group_size: int | None
    mode: RuleMode

    def matches(self, name: str, layer: int | None, layers: int) -> bool:
        """Whether the rule is for module `name` in `layer`, which is None outside the body's layers."""
        if self.layers and (layer is None or not any(some.holds(layer, layers) for some in self.layers)):
            return False
        mtp = name.startswith("mtp.")
        return any(
            pattern.startswith("mtp.") == mtp and fnmatchcase(name, pattern) for pattern in self.patterns
        )

    def __str__(self) -> str:
        return ", ".join(self.patterns)


@dataclass(frozen=True)
class RecipeFile:
    """A whole recipe. Routers get 8 bits regardless of the rules, or stay dense if `routers_dense`.

    `rounding` is None where the recipe leaves it to the command line.
    """

    name: str
    default_bits: int
    group_size: int
    routers_dense: bool
    rules: tuple[Rule, ...]
    rounding: RoundingMethod | None = None

    @property
    def is_builtin(self) -> bool:
        return self.name in (*BUILTIN, FLOAT_MAP, BEST)


def read_recipe(name: str) -> RecipeFile:
    """Read a built-in recipe by its name, or a TOML file by its path. Raises UsageError."""
    if name == BEST:
        raise UsageError("the recipe best needs a budget: give --target-size, --target-bpw or --target-speed")
    if name in (*BUILTIN, FLOAT_MAP):
        path = BUILTIN_FOLDER / f"{name}.toml"
    elif name.endswith(".toml") or "/" in name:
        path = Path(name).expanduser()
    else:
        known = (*BUILTIN, BEST)
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}, or a .toml file"
        raise UsageError(f"there is no recipe {name!r}; {hint}")
    return _parse(read_text(path, UsageError, MAX_FILE_NBYTES), name)


def _parse(text: str, name: str) -> RecipeFile:
    try:
        fields = parse_toml(text)
    except ValueError as problem:
        raise UsageError(f"the recipe {name} is not valid TOML: {problem}") from problem
    table = _Table(fields, f"the recipe {name}", FILE_KEYS)
    rules = fields.get("rule")
    if (
        not isinstance(rules, list)
        or not 0 < len(rules) <= MAX_RULES
        or not all(isinstance(r, dict) for r in rules)
    ):
        table.refuse("rule", f"1 to {MAX_RULES} [[rule]] tables")
    parsed = tuple(
        _rule(_Table(r, f"the recipe {name}, rule {i}", RULE_KEYS)) for i, r in enumerate(rules, 1)
    )
    if "*" not in parsed[-1].patterns or parsed[-1].layers:
        raise UsageError(f'the recipe {name} leaves modules undecided: its last rule must have match = "*"')
    return RecipeFile(
        name=name,
        default_bits=table.choice("default_bits", AFFINE_BITS, 4),
        group_size=table.choice("group_size", AFFINE_GROUPS, 64),
        routers_dense=table.choice("routers", ("pinned", "dense"), "pinned") == "dense",
        rules=parsed,
        rounding=table.choice("rounding", get_args(RoundingMethod), None),
    )


class _Table:
    """One table of a recipe file; refuses unknown keys."""

    def __init__(self, fields: Mapping[str, Any], where: str, known: tuple[str, ...]):
        self.fields = fields
        self.where = where
        for key in fields:
            if key not in known:
                raise UsageError(f"{where} has the unknown key {key!r}; known are {', '.join(known)}")

    def refuse(self, key: str, wanted: str) -> NoReturn:
        found = f"has the {key} {quote_value(self.fields[key])}" if key in self.fields else f"has no {key}"
        raise UsageError(f"{self.where} {found}, wanted {wanted}")

    def choice(self, key: str, allowed: tuple, default: Any) -> Any:
        value = self.fields.get(key, default)
        if isinstance(value, bool) or value not in (*allowed, default):
            self.refuse(key, ", ".join(map(str, allowed)))
        return value

    def texts(self, key: str) -> list[str]:
        value = self.fields.get(key, [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            self.refuse(key, "a text or a list of texts")
        return texts


def _rule(table: _Table) -> Rule:
    patterns = table.texts("match") or table.refuse("match", "patterns of module names, as in *.down_proj")
    mode: RuleMode = table.choice("mode", get_args(RuleMode), "affine")
    group = table.choice("group_size", AFFINE_GROUPS, None)
    if group is not None and mode != "affine":
        table.refuse("group_size", f"none, because mode {mode} fixes it")
    layers = tuple(_layers(table, words) for words in table.texts("layers"))
    return Rule(tuple(patterns), layers, _bits(table, mode), group, mode)


def _bits(table: _Table, mode: RuleMode) -> Bits | None:
    """The bits of a rule, or None for a dense rule."""
    given, dense = table.fields.get("bits"), table.fields.get("dense", False)
    if not isinstance(dense, bool):
        table.refuse("dense", "true or false")
    if dense:
        for key in {"bits", "group_size", "mode"} & table.fields.keys():
            table.refuse(key, "none, because the rule is dense")
        return None
    if mode != "affine":
        allowed = (FLOAT_BITS[mode],) if mode in FLOAT_BITS else (4, 8)
        return Bits(table.choice("bits", allowed, allowed[0]), relative=False)
    expression = RELATIVE_BITS.fullmatch(given) if isinstance(given, str) else None
    if expression is not None:
        sign, number = expression.groups()
        return Bits(int(f"{sign or '+'}{number or 0}"), relative=True)
    if given is None:
        table.refuse("bits", 'bits (4, "N", "N+1"), a float mode, or dense = true')
    return Bits(table.choice("bits", AFFINE_BITS, None), relative=False)


def _layers(table: _Table, words: str) -> Layers:
    match = LAYER_WORDS.fullmatch(words)
    if match is None:
        table.refuse("layers", 'words like "first 4", "last 1/8" or "every 3 after 1/8"')
    kind, amount, whole, step, after, after_whole = match.groups()
    if kind:
        return Layers(kind, (int(amount), int(whole or 0)))
    return Layers("every", (int(after), int(after_whole or 0)), int(step))
