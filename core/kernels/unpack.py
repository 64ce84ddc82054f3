"""Text that unpacks a slot of 32 packed weights to 16 pairs of halves, for all of MLX's widths and modes.

MLX packs a row's codes as one little-endian bit stream, so 32 of them fill as many words as a code has bits.
Left in place in a half's mantissa, an integer code is the subnormal half q * 2^(shift - 24). So codes need no
conversion: instead each input is scaled by a power of two for its weight's place.
"""

from dataclasses import dataclass
from functools import lru_cache
from string import Template

from ..checkpoint.packed import Geometry

WEIGHTS = 32  # weights of a slot
DENSE_WEIGHTS = 8  # weights of a slot of bfloat16: a single load
MANTISSA = 10  # bits of a half's mantissa
# a half holds up to 2^16: the largest input of a slot becomes 2^14 to 2^15, with e4m3 codes 2^9 to 2^10
INPUT_EXPONENT, E4M3_INPUT_EXPONENT = 14, 9
INTEGER_EXPONENT = 24  # the lowest mantissa bit of a half below 2^-14 is 2^-24
E2M1_EXPONENT = 14  # e2m1 bits at the top of a half's exponent and mantissa are 2^-14 of their value
E4M3_EXPONENT = 8


@dataclass(frozen=True)
class Pair:
    """Weights `low` and `high` of a slot as the halves of one word, 2^`shift` times too large."""

    low: int
    high: int
    shift: int
    text: str  # the expression of the word's 32 bits


@dataclass(frozen=True)
class Unpacking:
    """The pairs of a slot in the order of their weights, and the `setup` text that their expressions need.

    A pair's product with inputs scaled by 2^(e - shift) is 2^(e - `exponent`) times the true one.
    """

    setup: str
    pairs: tuple[Pair, ...]
    exponent: int
    input_exponent: int


# $into begins the names of words, scales and biases, $side ends those of the arrays
_WORDS = {
    2: "const uint2 a = stream2(from); $into[r][0] = a.x; $into[r][1] = a.y;",
    3: "UNROLL for (uint i = 0; i < 3; ++i) $into[r][i] = from[i];",
    4: """const uint4 a = stream4(from); $into[r][0] = a.x; $into[r][1] = a.y; $into[r][2] = a.z;
        $into[r][3] = a.w;""",
    5: "UNROLL for (uint i = 0; i < 5; ++i) $into[r][i] = from[i];",
    6: """UNROLL for (uint i = 0; i < 3; ++i) {
          const uint2 a = ((const DEVICE uint2*)from)[i]; $into[r][2 * i] = a.x; $into[r][2 * i + 1] = a.y;
        }""",
    8: """UNROLL for (uint i = 0; i < 2; ++i) {
          const uint4 a = ((const DEVICE uint4*)from)[i]; $into[r][4 * i] = a.x; $into[r][4 * i + 1] = a.y;
          $into[r][4 * i + 2] = a.z; $into[r][4 * i + 3] = a.w;
        }""",
}
_E8M0 = "${into}scale[r][0] = bits_float(uint(scales$side[group]) << 23);"
_SCALES = {
    "affine": "${into}scale[r][0] = float(scales$side[group]); ${into}bias[r] = float(biases$side[group]);",
    "mxfp4": _E8M0,
    "mxfp8": _E8M0,
    # e4m3 without a sign, read as a half: 2^-8 of its value
    "nvfp4": """UNROLL for (uint i = 0; i < 2; ++i) {
          const uint code = uint(scales$side[group + i]) & 0x7f;
          ${into}scale[r][i] = 256.0f * halves_low(bits_halves(code << 7));
        }""",
}


def load_text(geometry: Geometry | None, *, into: str = "", side: str = "") -> str:
    """Return text that loads slot `at` of an array into row `r` of words, scales and biases.

    A geometry of None is bfloat16.
    """
    bits = geometry.bits if geometry else 4
    lines = [f"const DEVICE uint* from = (const DEVICE uint*)weight{side} + at * {bits};"]
    lines.append(Template(_WORDS[bits]).substitute(into=f"{into}word"))
    if geometry:
        lines.append(f"const uint group = at * {WEIGHTS} / {geometry.group_size};")
        lines.append(Template(_SCALES[geometry.mode]).substitute(into=into, side=side))
    return "\n        ".join(lines)


def scale_count(geometry: Geometry) -> int:
    """Return the number of scales of a slot."""
    return max(WEIGHTS // geometry.group_size, 1)


@lru_cache
def unpacking(geometry: Geometry) -> Unpacking:
    """Return how to unpack the words `word[0]` to `word[bits - 1]` of a slot."""
    if geometry.mode == "affine":
        return _integers(geometry.bits)
    return _e2m1() if geometry.bits == 4 else _e4m3()


def values_text(geometry: Geometry) -> str:
    """Return text that unpacks row `r` of words to `value[32]`, floats in the order of the weights."""
    code = unpacking(geometry)
    lines = [code.setup]
    for place, pair in enumerate(code.pairs):
        group = 2 * place * scale_count(geometry) // WEIGHTS
        scale = f"scale[r][{group}] * {2.0 ** (code.exponent - pair.shift)}f"
        low, high = (
            f"value[{i}] = halves_{half}(code) * ({scale}) + bias[r];"
            for i, half in ((pair.low, "low"), (pair.high, "high"))
        )
        lines.append(f"{{ const halves code = bits_halves({pair.text}); {low} {high} }}")
    return "\n      ".join(lines).replace("word[", "word[r][")


def write_text(geometry: Geometry, to: str) -> str:
    """Return text that writes slot `at` in bfloat16, its quarter `i` to the four words `to`."""
    return _WRITE.substitute(
        words=geometry.bits,
        scales=scale_count(geometry),
        load=load_text(geometry),
        values=values_text(geometry),
        to=to,
    )


_WRITE = Template("""constexpr uint r = 0;
    uint word[1][$words];
    float scale[1][$scales], bias[1] = {0}, value[32];
    $load
    $values
    UNROLL for (uint i = 0; i < 4; ++i) {
      const uint4 four = {
        float_pair(value[8 * i], value[8 * i + 1]), float_pair(value[8 * i + 2], value[8 * i + 3]),
        float_pair(value[8 * i + 4], value[8 * i + 5]), float_pair(value[8 * i + 6], value[8 * i + 7])};
      $to = four;
    }""")


def _integers(bits: int) -> Unpacking:
    """Pair codes i and i + h in one word, where h codes fill whole bytes, at least two."""
    half = {2: 8, 3: 8, 4: 4, 5: 8, 6: 4, 8: 2}[bits]
    distance = half * bits // 8  # bytes
    names: dict[int, str] = {}
    pairs = []
    for first in range(0, WEIGHTS, 2 * half):
        right = 0
        for i in range(half):
            byte = min(i * bits // 8, distance - 2) if distance > 2 else 0
            place = i * bits - 8 * byte
            window = names.setdefault(first * bits // 8 + byte, f"w{len(names)}")
            if not 0 <= place - right <= MANTISSA - bits:
                right = place if place + bits > MANTISSA else 0
            shift = place - right
            mask = ((1 << bits) - 1) << shift
            moved = f"({window} >> {right})" if right else window
            pairs.append(Pair(first + i, first + i + half, shift, f"{moved} & {mask | mask << 16:#010x}u"))
    setup = "\n".join(f"const uint {name} = {_window(byte, distance)};" for byte, name in names.items())
    return Unpacking(setup, tuple(pairs), INTEGER_EXPONENT, INPUT_EXPONENT)


def _window(byte: int, distance: int) -> str:
    """Return two bytes from `byte` on and the two that are `distance` bytes further as one word."""
    word, start = divmod(byte, 4)
    near, far = f"word[{word}]", f"word[{word + 1}]"
    if (start, distance) == (0, 2):
        return near
    later = start + distance
    if later + 1 < 8:
        return f"picked<{start}, {start + 1}, {later}, {later + 1}>({near}, {far})"
    # the bytes are spread over three words: join the last two first, as byte 4 may be needed, too
    tail = f"picked<0, {later - 4}, {later - 3}, 0>({far}, word[{word + 2}])"
    return f"picked<{start}, {start + 1 if start < 3 else 4}, 5, 6>({near}, {tail})"


def _e2m1() -> Unpacking:
    """Move the sign to the top, and exponent and mantissa (3 bits) below a half's 3 highest exponent bits."""
    pairs = []
    for word in range(4):
        for i in range(4):
            name = f"word[{word}]"
            sign, rest = f"{name} << {12 - 4 * i}", f"{name} << {9 - 4 * i}"
            if i == 3:
                sign, rest = name, f"{name} >> 3"
            text = f"(({sign}) & 0x80008000u) | (({rest}) & 0x0e000e00u)"
            pairs.append(Pair(8 * word + i, 8 * word + i + 4, 0, text))
    return Unpacking("", tuple(pairs), E2M1_EXPONENT, INPUT_EXPONENT)


def _e4m3() -> Unpacking:
    """Move the sign to the top, and exponent and mantissa (7 bits) below a half's highest exponent bit."""
    pairs = []
    for word in range(8):
        for i in range(2):
            name = f"word[{word}]"
            sign, rest = (name, f"{name} >> 1") if i else (f"{name} << 8", f"{name} << 7")
            text = f"(({sign}) & 0x80008000u) | (({rest}) & 0x3f803f80u)"
            pairs.append(Pair(4 * word + i, 4 * word + i + 2, 0, text))
    return Unpacking("", tuple(pairs), E4M3_EXPONENT, E4M3_INPUT_EXPONENT)
