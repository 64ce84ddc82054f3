"""Sizes and pixels, against transformers' fast image processor."""

from pathlib import Path

import numpy as np
import pytest

from qchat.core.errors import UsageError
from qchat.core.machine.backend import mx
from qchat.core.vision.picture import Picture, encode_png
from qchat.core.vision.pixels import grid_of, patches, smart_size
from qchat.core.vision.resize import resize
from qchat.core.vision.settings import PixelSettings
from tests.golden.make_vision import FILE, SETTINGS, SIZES
from tests.vision_checkpoints import noise, png

OURS = PixelSettings(**SETTINGS)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FILE))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixel_values_are_those_of_transformers(size: tuple[int, int], golden: dict[str, np.ndarray]):
    picture = Picture(encode_png(noise(*size)))
    grid = grid_of(picture, OURS)
    assert [1, 2 * grid.rows, 2 * grid.columns] == golden[f"grid {size}"].tolist()
    found = np.array(patches(picture, grid, OURS))
    levels = golden[f"levels {size}"].astype(np.float32)  # the file has the resized picture, 8 bits a channel
    expected = (levels - 127.5) / 127.5
    assert np.abs(found - expected).max() <= 1e-5


def test_a_picture_that_has_the_wanted_size_stays_as_it_is():
    pixels = mx.array(np.asarray(noise(64, 48)))
    assert mx.array_equal(resize(pixels, 48, 64), pixels)


def test_every_size_is_whole_tokens_within_the_budget():
    draw = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(side) for side in draw.integers(1, 3000, 2))
        if max(height, width) > 200 * min(height, width):
            continue
        tall, wide = smart_size(height, width, OURS)
        assert tall % OURS.factor == wide % OURS.factor == 0
        assert tall >= OURS.factor and wide >= OURS.factor
        most = max(tall, wide) * OURS.factor
        assert OURS.min_pixels <= tall * wide <= max(OURS.max_pixels, most)


def test_a_very_long_picture_is_refused_with_its_size():
    with pytest.raises(UsageError, match="1 x 10,000 pixels: the longer side may be at most 200"):
        grid_of(Picture(png(1, 10_000), "line.png"), OURS)


def test_the_golden_file_is_small():
    assert Path(FILE).stat().st_size < 400_000
