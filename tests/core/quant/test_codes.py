"""The levels of MLX's codes, and scales of float codes that are searched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.checkpoint.packed import FLOAT_MODES, Geometry, Packed
from qchat.core.machine.backend import mx
from qchat.core.quant.codes import nearest_levels, pack_levels, read_scales, store_scales
from qchat.core.quant.rounding import quantize, rounding_error

FLOATS = [Geometry(bits, group, mode) for (bits, group), mode in FLOAT_MODES.items()]
each_float = pytest.mark.parametrize("geometry", FLOATS, ids=str)


def matrix(*shape: int, seed: int = 0) -> mx.array:
    draw = np.random.default_rng(seed)
    return mx.array(draw.standard_t(4, shape).astype(np.float32) * 0.05).astype(mx.bfloat16)


def group_errors(weight: mx.array, packed: Packed, importance: mx.array) -> np.ndarray:
    """Importance times squared error of each group, in float64, of the weights that a runtime would see."""
    rest = np.array(weight.astype(mx.float32), np.float64) - np.array(packed.dequantize(mx.float32))
    weighted = np.array(importance, np.float64) * rest**2
    return weighted.reshape(len(weighted), -1, packed.group_size).sum(axis=-1)


@each_float
def test_levels_and_scales_are_stored_as_mlx_stores_them(geometry: Geometry):
    weight = matrix(5, 128)
    words, stored, *_ = mx.quantize(weight, geometry.group_size, geometry.bits, mode=geometry.mode)
    scales = read_scales(stored, geometry)
    assert mx.array_equal(store_scales(scales, geometry, mx.bfloat16), stored)
    groups = weight.astype(mx.float32).reshape(5, -1, geometry.group_size)
    levels = nearest_levels(groups / scales[..., None], geometry).reshape(5, 128)
    ours = Packed(
        pack_levels(levels, geometry), stored, None, geometry.group_size, geometry.bits, geometry.mode
    )
    back = levels.reshape(groups.shape) * scales[..., None]
    assert mx.array_equal(ours.dequantize(mx.float32), back.reshape(5, 128))
    # MLX breaks a few ties the other way
    assert (
        ours.dequantize(mx.float32)
        == Packed(words, stored, None, *ours_triple(geometry)).dequantize(mx.float32)
    ).mean() > 0.98


def ours_triple(geometry: Geometry) -> tuple:
    return geometry.group_size, geometry.bits, geometry.mode


@settings(max_examples=60, deadline=None)
@given(
    geometry=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
    spread=st.floats(0, 4),
    zeros=st.floats(0, 1),
    known=st.booleans(),
)
def test_no_group_of_a_float_code_is_worse_than_as_mlx_rounds_it(
    geometry: Geometry, seed: int, spread: float, zeros: float, known: bool
):
    draw = np.random.default_rng(seed)
    values = draw.standard_t(3, (3, 128)) * 10.0 ** draw.integers(-4, 3)
    values[0, :64] = 0
    weight = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    drawn = np.exp(spread * draw.normal(size=128)) * (draw.random(128) >= zeros)
    importance = mx.array(drawn.astype(np.float32)) if known else mx.ones(128)
    found = quantize(weight, geometry, importance if known else None, method="weighted")
    plain = quantize(weight, geometry)
    assert found.geometry == plain.geometry
    ours, theirs = (group_errors(weight, packed, importance) for packed in (found, plain))
    assert (ours <= theirs * (1 + 1e-4) + 1e-30).all()


@pytest.mark.parametrize(("mode", "share"), [("mxfp4", 0.9), ("nvfp4", 0.9)])
def test_searched_scales_make_the_error_of_four_bits_noticeably_smaller(mode: str, share: float):
    geometry = next(code for code in FLOATS if code.mode == mode)
    weight, everywhere = matrix(64, 512), mx.ones(512)
    found = quantize(weight, geometry, method="weighted")
    plain = quantize(weight, geometry)
    assert (
        group_errors(weight, found, everywhere).sum() < share * group_errors(weight, plain, everywhere).sum()
    )


@each_float
def test_the_error_that_is_predicted_for_searched_scales_is_the_one_that_results(geometry: Geometry):
    weight, importance = matrix(16, 256), mx.abs(matrix(1, 256)[0]).astype(mx.float32)
    packed = quantize(weight, geometry, importance, method="weighted")
    expected = group_errors(weight, packed, importance).sum()
    predicted = rounding_error(weight, importance[None], geometry, "weighted")
    assert float(predicted) == pytest.approx(expected, rel=1e-4)


def test_nearest_pays_no_attention_to_importances():
    weight, three = matrix(4, 128), Geometry(3, 64, "affine")
    ours, plain = quantize(weight, three, mx.arange(128) + 1.0, method="nearest"), quantize(weight, three)
    assert all(mx.array_equal(a, b) for a, b in zip(ours.arrays, plain.arrays, strict=True))
