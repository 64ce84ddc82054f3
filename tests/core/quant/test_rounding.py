"""Packing weights: MLX's layout bit for bit, and rounding that suits the importances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.checkpoint.packed import AFFINE_BITS, AFFINE_GROUPS, FLOAT_MODES, Geometry, Packed
from qchat.core.errors import UsageError
from qchat.core.machine.backend import mx
from qchat.core.quant import rounding
from qchat.core.quant.codes import pack, unpack
from qchat.core.quant.rounding import quantize, rounding_error

ALL_AFFINE = [Geometry(bits, group, "affine") for bits in AFFINE_BITS for group in AFFINE_GROUPS]
FLOATS = [Geometry(bits, group, mode) for (bits, group), mode in FLOAT_MODES.items()]
THREE = Geometry(3, 64, "affine")


def matrix(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    draw = np.random.default_rng(seed)
    return mx.array(draw.standard_t(4, shape).astype(np.float32) * 0.05).astype(dtype)


def importances(*shape: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).lognormal(0, 2, shape).astype(np.float32))


def error(weight: mx.array, packed: Packed, importance: mx.array) -> float:
    """In float64, of the weights that a runtime would see."""
    rest = np.array(weight.astype(mx.float32), np.float64) - np.array(packed.dequantize(mx.float32))
    return float((np.array(importance, np.float64) * rest**2).sum())


def same(a: Packed, b: Packed) -> bool:
    return a.geometry == b.geometry and all(
        x.dtype == y.dtype and mx.array_equal(x, y) for x, y in zip(a.arrays, b.arrays, strict=True)
    )


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_codes_are_packed_as_mlx_packs_them(bits: int):
    codes = mx.array(np.random.default_rng(bits).integers(0, 2**bits, (5, 128)).astype(np.float32))
    codes[:, 0::64], codes[:, 1::64] = 0, 2**bits - 1
    words, scales, biases = mx.quantize(codes, 64, bits)
    stored = mx.round((codes.reshape(5, 2, 64) - biases[..., None]) / scales[..., None]).reshape(5, 128)
    assert mx.array_equal(pack(stored, bits), words)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_codes_come_back_from_their_words(bits: int):
    codes = mx.array(np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 128)))
    assert mx.array_equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("geometry", [*ALL_AFFINE, *FLOATS], ids=str)
def test_without_importances_the_rounding_is_mlx_own(geometry: Geometry):
    weight = matrix(6, 256, dtype=mx.bfloat16)
    packed = quantize(weight, geometry)
    expected = mx.quantize(weight, geometry.group_size, geometry.bits, mode=geometry.mode)
    assert all(mx.array_equal(a, b) for a, b in zip(packed.arrays, expected, strict=True))
    assert packed.geometry == geometry


@pytest.mark.parametrize("geometry", FLOATS, ids=str)
def test_float_codes_pay_no_attention_to_importances(geometry: Geometry):
    weight = matrix(4, 128)
    assert same(quantize(weight, geometry, importances(128)), quantize(weight, geometry))


@settings(max_examples=60, deadline=None)
@given(
    geometry=st.sampled_from(ALL_AFFINE),
    seed=st.integers(0, 1000),
    spread=st.floats(0, 4),
    zeros=st.floats(0, 1),
    constant=st.booleans(),
)
def test_the_weighted_error_is_never_above_that_of_mlx(
    geometry: Geometry, seed: int, spread: float, zeros: float, constant: bool
):
    draw = np.random.default_rng(seed)
    values = draw.standard_t(3, (3, 256)) * 10.0 ** draw.integers(-4, 2)
    values[0] = values[0, 0] if constant else values[0]
    weight = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    importance = np.exp(spread * draw.normal(size=256)) * (draw.random(256) >= zeros)
    weights = mx.array(importance.astype(np.float32))
    packed = quantize(weight, geometry, weights)
    assert all(mx.all(mx.isfinite(array)) for array in packed.arrays[1:])
    assert error(weight, packed, weights) <= error(weight, quantize(weight, geometry), weights) * (1 + 1e-4)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.8), (3, 0.8), (4, 0.8), (5, 0.85), (6, 0.9)])
def test_importances_make_the_error_noticeably_smaller(bits: int, share: float):
    geometry, weight, importance = Geometry(bits, 64, "affine"), matrix(32, 512), importances(512)
    plain = quantize(weight, geometry)
    assert error(weight, quantize(weight, geometry, importance), importance) < share * error(
        weight, plain, importance
    )


def test_groups_keep_their_spread():
    """Shrunken weights would have the smaller error and the weaker outputs."""
    weight = matrix(64, 256)
    back = quantize(weight, Geometry(2, 64, "affine"), mx.ones(256)).dequantize(mx.float32)
    assert float(mx.var(back) / mx.var(weight)) == pytest.approx(1, abs=0.04)  # 0.88 by least squares


def test_a_stack_is_packed_expert_by_expert():
    weight, importance = matrix(3, 8, 128, dtype=mx.bfloat16), importances(3, 128)
    stack = quantize(weight, THREE, importance)
    for expert in range(3):
        alone = quantize(weight[expert], THREE, importance[expert])
        assert all(mx.array_equal(a[expert], b) for a, b in zip(stack.arrays, alone.arrays, strict=True))


def test_one_row_of_importances_serves_every_expert():
    weight, importance = matrix(3, 8, 128), importances(128)
    each = mx.broadcast_to(importance, (3, 128))
    assert same(quantize(weight, THREE, importance), quantize(weight, THREE, each))


def test_the_size_of_the_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    weight, importance = matrix(37, 128), importances(128)
    whole = quantize(weight, THREE, importance)
    monkeypatch.setattr(rounding, "CHUNK_WEIGHTS", 5 * 128)
    assert same(quantize(weight, THREE, importance), whole)


@pytest.mark.parametrize("geometry", [THREE, *FLOATS], ids=str)
def test_the_error_that_is_predicted_is_the_error_that_results(geometry: Geometry):
    weight, importance = matrix(16, 256, dtype=mx.bfloat16), importances(256)
    expected = error(weight, quantize(weight, geometry, importance), importance)
    assert float(rounding_error(weight, importance[None], geometry)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_scales_and_biases_have_the_dtype_that_was_asked_for(dtype: mx.Dtype):
    packed = quantize(matrix(4, 128), THREE, importances(128), dtype)
    assert packed.scales.dtype == dtype
    assert packed.biases is not None
    assert packed.biases.dtype == dtype


@pytest.mark.parametrize(
    ("weight", "importance"),
    [((4, 96), None), ((128,), None), ((4, 128), (64,)), ((2, 4, 128), (3, 128)), ((4, 128), (4, 128))],
)
def test_shapes_that_do_not_go_together_are_refused(
    weight: tuple[int, ...], importance: tuple[int, ...] | None
):
    with pytest.raises(UsageError, match=r"cannot be packed|do not fit"):
        quantize(mx.zeros(weight), THREE, None if importance is None else mx.ones(importance))
