"""The error law: the KL divergence of a group of matrices in every code, from the few that were measured.

An additional bit divides the divergence by four; the size of a quantization group multiplies it by the same
factor in every width. More bits and smaller groups never cost more.
"""

from collections.abc import Mapping

from ..checkpoint.packed import AFFINE_BITS, AFFINE_GROUPS, Geometry

FALL_PER_BIT = 4.0
# of a group size against 64, where it was not measured
USUAL_FACTORS = {128: 1.18, 64: 1.0, 32: 0.79}


def predicted_kl(measured: Mapping[Geometry, float], width: int) -> dict[Geometry, float]:
    """Return the predicted KL of every affine code that fits rows of `width`."""
    base = 64 if width % 64 == 0 else 32
    by_bits = {code.bits: kl for code, kl in measured.items() if code.group_size == base}
    factors = _group_factors(measured, base)
    return {
        Geometry(bits, group, "affine"): _at_bits(by_bits, bits) * factors[group]
        for bits in AFFINE_BITS
        for group in AFFINE_GROUPS
        if width % group == 0
    }


def _at_bits(measured: Mapping[int, float], bits: int) -> float:
    nearest = min(measured, key=lambda known: (abs(known - bits), -known))
    return measured[nearest] * FALL_PER_BIT ** (nearest - bits)


def _group_factors(measured: Mapping[Geometry, float], base: int) -> dict[int, float]:
    """Return the factor of each group size against `base`: measured in some width, or usual."""
    factors = {group: factor / USUAL_FACTORS[base] for group, factor in USUAL_FACTORS.items()}
    for code, kl in measured.items():
        plain = measured.get(Geometry(code.bits, base, "affine"), 0.0)
        if code.group_size != base and plain > 0:
            ratio = kl / plain
            factors[code.group_size] = max(ratio, 1.0) if code.group_size > base else min(ratio, 1.0)
    return factors
