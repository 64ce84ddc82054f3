"""The rotary position embedding that a config asks for: radians per position, and the factor of YaRN.

Reads the fields as transformers does: `rope_scaling` is the older name of `rope_parameters` and replaces it,
`type` is that of `rope_type`, and `rope_theta` and `partial_rotary_factor` may stand beside either. Rounds to
float32 where transformers does, because an angle multiplies a frequency's error by a million positions.
Refuses types that change with the length of the text.
"""

import math
import struct
from dataclasses import dataclass

from .fields import Fields

DEFAULT_THETA = 10_000.0  # transformers' default; the published models name theirs
DEFAULT_FRACTION = 0.25
DEFAULT_CONTEXT = 32768  # what transformers takes as `max_position_embeddings` where a config has none
TYPES = ("default", "linear", "yarn")
LAYER_TYPES = ("full_attention", "linear_attention")
DEFAULT_SECTIONS = (11, 11, 10)  # transformers' default
MIN_THETA, MAX_THETA = 1e-6, 1e12
MAX_CONTEXT = 1 << 26
MAX_FACTOR = 1e6


@dataclass(frozen=True)
class Rope:
    """The rotation of the first `fraction` of a head's columns.

    `frequencies` are the radians per position of each pair, empty if `theta` alone gives them.
    `attention_factor` multiplies cosines and sines. `context` is the length that YaRN allows, or 0.
    """

    theta: float
    fraction: float
    frequencies: tuple[float, ...] = ()
    attention_factor: float = 1.0
    context: int = 0


def read_rope(text: Fields, head_dim: int) -> tuple[Rope, tuple[str, ...]]:
    """Read the rope fields of the text part of a config, and sentences about what it leaves open.

    Raises ConfigError naming the field.
    """
    old, new = (_section(text, name) for name in ("rope_scaling", "rope_parameters"))
    rope = _read_section(text, old or new or Fields({}, text.where), head_dim)
    if old is not None and new is not None and _read_section(text, new, head_dim) != rope:
        raise text.refuse("rope_scaling", "nothing beside a rope_parameters that says otherwise")
    named = text.values.get("rope_theta") is not None or "rope_theta" in (old or new or text).values
    note = f"config.json names no rope_theta: {DEFAULT_THETA:,.0f}, transformers' default, is used"
    return rope, () if named else (note,)


def read_mrope_section(text: Fields) -> tuple[int, ...]:
    """Read how many pairs of columns turn by a token's moment, row and column. Raises ConfigError."""
    rope = _section(text, "rope_scaling") or _section(text, "rope_parameters") or Fields({}, text.where)
    found = rope.values.get("mrope_section")
    if found is None:
        return DEFAULT_SECTIONS
    if not isinstance(found, list) or len(found) != 3 or any(type(n) is not int or n < 0 for n in found):
        raise rope.refuse("mrope_section", "three whole numbers")
    return tuple(found)


def _section(text: Fields, name: str) -> Fields | None:
    """The object `name`, None where it is missing, null or empty. Raises ConfigError."""
    if text.values.get(name) in (None, {}):
        return None
    section = text.section(name)
    for layer_type in LAYER_TYPES:
        if layer_type in section.values:
            raise section.refuse(layer_type, "nothing: one rope for all layers")
    return section


def _read_section(text: Fields, rope: Fields, head_dim: int) -> Rope:
    theta = _beside(text, rope, "rope_theta").number(
        "rope_theta", MIN_THETA, MAX_THETA, default=DEFAULT_THETA
    )
    fraction = _beside(text, rope, "partial_rotary_factor").number(
        "partial_rotary_factor", 0.0, 1.0, default=DEFAULT_FRACTION
    )
    rotated = int(head_dim * fraction)
    if rotated % 2 or rotated == 0:
        raise text.refuse("head_dim", f"one whose rotated part (times {fraction:g}) is even and not empty")
    name = "type" if rope.values.get("rope_type") is None else "rope_type"
    kind = rope.values.get(name)
    if kind is not None and kind not in TYPES:
        raise rope.refuse(name, " or ".join(TYPES))
    if kind == "linear":
        factor = _factor(rope)
        return Rope(theta, fraction, tuple(_round(f / factor) for f in _plain_frequencies(theta, rotated)))
    if kind == "yarn":
        return _yarn(text, rope, theta, fraction, rotated)
    return Rope(theta, fraction)


def _beside(text: Fields, rope: Fields, name: str) -> Fields:
    """Where `name` is: in the section itself, or else beside it."""
    return rope if rope.values.get(name) is not None else text


def _factor(rope: Fields) -> float:
    if "factor" not in rope.values:
        raise rope.refuse("factor", f"a number above 0 and at most {MAX_FACTOR:g}")
    return rope.number("factor", 0.0, MAX_FACTOR)


def _plain_frequencies(theta: float, rotated: int) -> list[float]:
    return [_round(1 / wavelength) for wavelength in _wavelengths(theta, rotated)]


def _wavelengths(theta: float, rotated: int) -> list[float]:
    """theta ** (2i / rotated) for each pair i, in float32."""
    base = _round(theta)
    return [_round(base ** _round(2 * i / rotated)) for i in range(rotated // 2)]


def _yarn(text: Fields, rope: Fields, theta: float, fraction: float, rotated: int) -> Rope:
    """YaRN (arXiv 2309.00071): high frequencies as they are, low ones divided by `factor`, a ramp between."""
    original = _original_length(text, rope)
    longest = text.integer("max_position_embeddings", 1, MAX_CONTEXT, default=DEFAULT_CONTEXT)
    factor = longest / original if _is_null(rope, "factor") else _factor(rope)
    if theta <= 1:
        raise _beside(text, rope, "rope_theta").refuse("rope_theta", "a number above 1 for YaRN")
    low, high = _ramp_bounds(rope, theta, rotated, original)
    frequencies = []
    for pair, wavelength in enumerate(_wavelengths(theta, rotated)):
        ramp = min(max(_round(_round(pair - _round(low)) / _round(high - low)), 0.0), 1.0)
        kept = _round(1 - ramp)
        stretched = _round(1 / _round(_round(factor) * wavelength))
        frequencies.append(
            _round(_round(stretched * _round(1 - kept)) + _round(_round(1 / wavelength) * kept))
        )
    attention_factor = _attention_factor(rope, factor)
    context = min(round(original * factor), MAX_CONTEXT)
    return Rope(theta, fraction, tuple(frequencies), attention_factor, context)


def _original_length(text: Fields, rope: Fields) -> int:
    """The length that the model was trained for; the field beside the section wins, as in transformers."""
    name = "original_max_position_embeddings"
    default = text.integer("max_position_embeddings", 1, MAX_CONTEXT, default=DEFAULT_CONTEXT)
    where = text if text.values.get(name) is not None else rope
    return where.integer(name, 1, MAX_CONTEXT, default=default)


def _attention_factor(rope: Fields, factor: float) -> float:
    """The factor that the section names, or what the paper recommends for `factor`."""
    if rope.values.get("attention_factor") is not None:
        return rope.number("attention_factor", 0.0, MAX_FACTOR)
    scales = [_optional(rope, name, 0.0) for name in ("mscale", "mscale_all_dim")]
    if all(scales):
        return _mscale(factor, scales[0]) / _mscale(factor, scales[1])
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _ramp_bounds(rope: Fields, theta: float, rotated: int, original: int) -> tuple[float, float]:
    """The pairs between which the ramp lies, by how often they turn in `original` positions."""

    def pair(turns: float) -> float:
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(_optional(rope, "beta_fast", 32.0)), pair(_optional(rope, "beta_slow", 1.0))
    if _is_true(rope, "truncate"):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    return low, high + 0.001 if low == high else high


def _optional(rope: Fields, name: str, default: float) -> float:
    """A positive number; `default` where it is missing, null or 0, as in transformers."""
    return rope.number(name, 0.0, MAX_FACTOR) if rope.values.get(name) else default


def _is_true(rope: Fields, name: str) -> bool:
    """A flag that is true where it is missing, but false where it is null, as in transformers."""
    return not _is_null(rope, name) and rope.flag(name, True)


def _is_null(rope: Fields, name: str) -> bool:
    return name in rope.values and rope.values[name] is None


def _round(value: float) -> float:
    """`value` rounded to float32."""
    return struct.unpack("f", struct.pack("f", value))[0]
