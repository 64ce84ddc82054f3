"""Bicubic resizing of 8-bit pixels with antialiasing, bit for bit as torchvision does it on a CPU.

That is the filter of the fast image processor of transformers, which the published checkpoints name. It
differs from Pillow's by one level in some pixels: weights have 16 bits here. Rows first, then columns, each
rounded.
"""

import math

from ..machine.backend import mx

CUBIC = -0.5  # the parameter of the cubic with antialiasing
MAX_PRECISION = 22
BAND_VALUES = 1 << 17  # of the results of one pass; what a core's cache holds


def resize(pixels: mx.array, height: int, width: int) -> mx.array:
    """Resize pixels [H, W, C] uint8 to [height, width, C] uint8."""
    if width != pixels.shape[1]:
        pixels = _resize_columns(pixels.swapaxes(0, 1), width).swapaxes(0, 1)
    if height != pixels.shape[0]:
        pixels = _resize_columns(pixels, height)
    return pixels


def _resize_columns(pixels: mx.array, height: int) -> mx.array:
    """Resize the first axis of pixels [H, W, C], a band of columns at a time."""
    before, width, channels = pixels.shape
    first, weights, precision = _taps(before, height)
    places = [mx.minimum(first + tap, before - 1) for tap in range(weights.shape[0])]
    step = max(1, BAND_VALUES // (height * channels))
    bands = []
    for begin in range(0, width, step):
        band = mx.contiguous(pixels[:, begin : begin + step]).reshape(before, -1)
        total = mx.full((height, band.shape[1]), 1 << (precision - 1), mx.int32)
        for place, weight in zip(places, weights, strict=True):
            total = total + band[place].astype(mx.int32) * weight[:, None]
        bands.append(mx.clip(total >> precision, 0, 255).astype(mx.uint8).reshape(height, -1, channels))
        mx.eval(bands[-1])
    joined = mx.concatenate(bands, axis=1)
    mx.eval(joined)
    return joined


def _taps(before: int, after: int) -> tuple[mx.array, mx.array, int]:
    """Return the first input [after] of each output, its weights [taps, after] int32 and their precision."""
    scale = before / after
    support = 2.0 * max(scale, 1.0)
    firsts: list[int] = []
    weights: list[list[float]] = []
    for place in range(after):
        centre = scale * (place + 0.5)
        first = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), before) - first
        inverse = 1.0 / max(scale, 1.0)
        found = [_cubic((tap + first - centre + 0.5) * inverse) for tap in range(count)]
        total = sum(found)
        firsts.append(first)
        weights.append([weight / total for weight in found])
    precision = _precision(max(map(max, weights)))
    longest = max(map(len, weights))
    rounded = [[_rounded(w * (1 << precision)) for w in row] + [0] * (longest - len(row)) for row in weights]
    return mx.array(firsts, mx.int32), mx.array(rounded, mx.int32).T, precision


def _cubic(x: float) -> float:
    """Return the cubic convolution of Keys."""
    x = abs(x)
    if x < 1.0:
        return ((CUBIC + 2.0) * x - (CUBIC + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * CUBIC
    return 0.0


def _precision(largest: float) -> int:
    """Return the most bits with which the largest weight fits 16."""
    precision = 0
    while precision < MAX_PRECISION and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    return precision


def _rounded(weight: float) -> int:
    return math.trunc(weight - 0.5 if weight < 0 else weight + 0.5)
