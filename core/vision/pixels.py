"""A picture as patches: resized to whole image tokens within a budget, normalised, and cut in merge order."""

import math
from typing import NamedTuple

from ..errors import UsageError
from ..machine.backend import mx
from .picture import Picture
from .resize import resize
from .settings import PixelSettings

MAX_ASPECT = 200
STRIP = 256  # rows of pixels


class Grid(NamedTuple):
    """The image tokens of a picture: `rows` times `columns`."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def grid_of(picture: Picture, settings: PixelSettings) -> Grid:
    """Return the grid that a picture gets within the budget. Raises UsageError."""
    width, height = picture.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UsageError(
            f"{picture.name} has {width:,} x {height:,} pixels: the longer side may be at most {MAX_ASPECT} "
            "times the shorter"
        )
    factor = settings.factor
    return Grid(*(side // factor for side in smart_size(height, width, settings)))


def smart_size(height: int, width: int, settings: PixelSettings) -> tuple[int, int]:
    """Return height and width in whole tokens, close to the given ones and within the budget of pixels."""
    factor = settings.factor
    tall, wide = (round(side / factor) * factor for side in (height, width))
    if tall * wide > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        tall, wide = (max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width))
    elif tall * wide < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return tall, wide


def patches(picture: Picture, grid: Grid, settings: PixelSettings) -> mx.array:
    """Return the normalised patches [N, C * T * P * P] float32, those of one token after the other.

    A picture is one moment: its frame is repeated. Raises UsageError.
    """
    pixels = resize(_pixels(picture), grid.rows * settings.factor, grid.columns * settings.factor)
    patch, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    cut = pixels.reshape(grid.rows, merge, patch, grid.columns, merge, patch, 3)
    cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows, columns, merge, merge, C, P, P]
    cut = mx.repeat(cut.reshape(-1, 3, 1, patch**2), frames, axis=2)
    mx.eval(cut)  # so that the pixels can go before numbers take four times their memory
    del pixels
    mx.clear_cache()
    mean, std = (255 * mx.array(values, mx.float32) for values in (settings.mean, settings.std))
    normalised = (cut.astype(mx.float32) - mean[:, None, None]) / std[:, None, None]
    return normalised.reshape(grid.tokens * merge**2, -1)


def _pixels(picture: Picture) -> mx.array:
    """Return the pixels [H, W, 3] uint8. Raises UsageError."""
    image = picture.decode()
    width, height = image.size
    data = bytearray(3 * width * height)
    for top in range(0, height, STRIP):  # `tobytes` of the whole picture would take twice its size
        bottom = min(top + STRIP, height)
        data[3 * width * top : 3 * width * bottom] = image.crop((0, top, width, bottom)).tobytes()
    del image
    return mx.array(memoryview(data)).reshape(height, width, 3)  # pyright: ignore[reportArgumentType]
