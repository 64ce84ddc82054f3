"""MLX's codes: the levels that each can express, and how levels and scales are stored.

A weight is level * scale + bias. Affine levels are whole numbers from 0; mxfp4 and nvfp4 have the levels of
E2M1, mxfp8 those of E4M3. Scales are E8M0 in mxfp4 and mxfp8, and E4M3 in nvfp4.
"""

from ..checkpoint.packed import Geometry
from ..machine.backend import mx

WORD_BITS = 32
E2M1_MAX, E4M3_MAX = 6.0, 448.0
SMALLEST_E8M0, LARGEST_E8M0 = 2.0**-126, 2.0**127
# of the scale that puts a group's largest weight on the largest level
E4M3_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 1.1, 1.2)
MANTISSA_BITS = 23  # of float32, whose exponent has the bias of E8M0


def nearest_levels(x: mx.array, geometry: Geometry) -> mx.array:
    """Return the level nearest to each of x, which is (weight - bias) / scale; float32."""
    if geometry.mode == "affine":
        return mx.clip(mx.round(x), 0, 2**geometry.bits - 1)
    if geometry.mode == "mxfp8":
        return mx.from_fp8(mx.to_fp8(mx.clip(x, -E4M3_MAX, E4M3_MAX)), mx.float32)
    size = mx.abs(x)
    step = mx.where(size < 2, 0.5, mx.where(size < 4, 1.0, 2.0))
    return mx.sign(x) * mx.minimum(mx.round(size / step) * step, E2M1_MAX)


def pack_levels(levels: mx.array, geometry: Geometry) -> mx.array:
    """Return the words u32 [..., K * bits / 32] of levels [..., K]."""
    if geometry.mode == "affine":
        return pack(levels, geometry.bits)
    if geometry.mode == "mxfp8":
        return pack(mx.to_fp8(levels), geometry.bits)
    size = mx.abs(levels)
    index = mx.where(size <= 2, 2 * size, mx.where(size <= 4, size + 2, 7.0))
    return pack(index + mx.where(levels < 0, 8.0, 0.0), geometry.bits)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., K] below 2^bits as MLX packs them: little-endian bits in u32 [..., K * bits / 32]."""
    values = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, WORD_BITS)
    words = [mx.zeros(values.shape[:-1], mx.uint32) for _ in range(bits)]
    for i in range(WORD_BITS):
        word, shift = divmod(i * bits, WORD_BITS)
        words[word] = words[word] | (values[..., i] << shift)
        if shift + bits > WORD_BITS:
            words[word + 1] = words[word + 1] | (values[..., i] >> (WORD_BITS - shift))
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)


def unpack(words: mx.array, bits: int) -> mx.array:
    """Return the codes [..., K] that `pack` packed into words u32 [..., K * bits / 32]."""
    wide = mx.uint32 if bits <= 4 else mx.uint64  # eight codes fill `bits` bytes
    runs = words.view(mx.uint8).reshape(*words.shape[:-1], -1, bits).astype(wide)
    joined = runs[..., 0]
    for i in range(1, bits):
        joined = joined | (runs[..., i] << (8 * i))
    codes = (joined[..., None] >> mx.arange(0, 8 * bits, bits, dtype=wide)) & (2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)


def read_scales(stored: mx.array, geometry: Geometry) -> mx.array:
    """Return stored scales as float32."""
    if geometry.mode == "affine":
        return stored.astype(mx.float32)
    if geometry.mode == "nvfp4":
        return mx.from_fp8(stored, mx.float32)
    return (stored.astype(mx.uint32) << MANTISSA_BITS).view(mx.float32)


def store_scales(scales: mx.array, geometry: Geometry, dtype: mx.Dtype) -> mx.array:
    """Return float32 scales that the code can hold as they are stored; affine ones in `dtype`."""
    if geometry.mode == "affine":
        return scales.astype(dtype)
    if geometry.mode == "nvfp4":
        return mx.to_fp8(scales)
    return (scales.view(mx.uint32) >> MANTISSA_BITS).astype(mx.uint8)


def neighbouring_scales(scales: mx.array, weights: mx.array, geometry: Geometry) -> list[mx.array]:
    """Return scales worth trying beside a float code's own `scales` [..., 1], for weights [..., G].

    The neighbouring exponents of E8M0; for E4M3 those that put the largest weight on, above or below the
    largest level.
    """
    if geometry.mode != "nvfp4":
        return [mx.where(scales > SMALLEST_E8M0, scales / 2, scales), mx.minimum(scales * 2, LARGEST_E8M0)]
    top = mx.abs(weights).max(axis=-1, keepdims=True) / E2M1_MAX
    return [mx.from_fp8(mx.to_fp8(mx.minimum(top * share, E4M3_MAX)), mx.float32) for share in E4M3_SHARES]
