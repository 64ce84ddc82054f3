"""Products and widening in C against MLX's own, for every form that weights are stored in."""

from itertools import product

import numpy as np
import pytest

from qchat.core.checkpoint.packed import AFFINE_BITS, AFFINE_GROUPS, FLOAT_MODES, Packed
from qchat.core.machine.backend import mx
from qchat.core.native.library import MAX_ROWS, Library
from qchat.core.native.structures import Pinned
from tests.compare import relative_rms

# rounding in another order than MLX's
TOLERANCE = 2e-6
DENSE = (mx.float32, mx.bfloat16, mx.float16)
# whole blocks of 128, a rest, and a rest alone
COLUMNS = (256, 384 + 96, 64)


def packed(bits: int, group: int, mode: str, columns: int, *, rows: int = 40) -> Packed:
    weight = mx.random.normal((rows, columns)).astype(mx.bfloat16)
    parts = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
    biases = parts[2] if len(parts) == 3 else None
    return Packed(parts[0], parts[1], biases, group, bits, mode)  # pyright: ignore[reportArgumentType]


FORMS = [
    *((bits, group, "affine") for bits, group in product(AFFINE_BITS, AFFINE_GROUPS)),
    *((bits, group, mode) for (bits, group), mode in FLOAT_MODES.items()),
]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 2, 5, MAX_ROWS])
@pytest.mark.parametrize("dtype", DENSE, ids=str)
def test_dense_weights_are_multiplied_as_stored(library: Library, dtype: mx.Dtype, rows: int, columns: int):
    weight, x = mx.random.normal((40, columns)).astype(dtype), mx.random.normal((rows, columns))
    found = library.product(Pinned().matrix(weight), x)
    expected = np.array(x, np.float64) @ np.array(weight.astype(mx.float32), np.float64).T
    assert relative_rms(found, expected) < TOLERANCE


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_weights_are_multiplied_as_stored(library: Library, form: tuple[int, int, str], columns: int):
    columns = max(columns, form[1])
    columns -= columns % form[1]
    weight = packed(*form, columns)
    expected = np.array(weight.dequantize(mx.float32), np.float64)
    pinned = Pinned()
    assert relative_rms(library.widen(pinned.matrix(weight)), expected) < 1e-7
    for rows in (1, 3, MAX_ROWS):
        x = mx.random.normal((rows, columns))
        found = library.product(pinned.matrix(weight), x)
        assert relative_rms(found, np.array(x, np.float64) @ expected.T) < TOLERANCE


@pytest.mark.parametrize("dtype", DENSE, ids=str)
def test_scales_may_have_any_dtype(library: Library, dtype: mx.Dtype):
    weight = packed(4, 64, "affine", 256).with_dtype(dtype)
    expected = weight.dequantize(mx.float32)
    assert relative_rms(library.widen(Pinned().matrix(weight)), expected) < 1e-7


@pytest.mark.parametrize("dtype", DENSE, ids=str)
def test_every_number_is_widened_exactly(library: Library, dtype: mx.Dtype):
    """Subnormal, infinite and negative ones, too; a zero keeps its sign."""
    bits = mx.arange(1 << 16).astype(mx.uint16)
    numbers = bits.view(dtype) if dtype != mx.float32 else bits.view(mx.bfloat16).astype(mx.float32)
    numbers = numbers.reshape(512, 128)
    expected = np.array(numbers.astype(mx.float32))
    found = np.array(library.widen(Pinned().matrix(numbers)))
    normal = np.abs(expected) >= np.finfo(np.float32).tiny
    kept = np.isfinite(expected) & (normal | (expected == 0))
    assert (found.view(np.uint32)[kept] == expected.view(np.uint32)[kept]).all()
    assert (found[np.isinf(expected)] == expected[np.isinf(expected)]).all()


def test_experts_stand_below_each_other(library: Library):
    weight = mx.random.normal((3, 8, 128)).astype(mx.bfloat16)
    x = mx.random.normal((1, 128))
    found = library.product(Pinned().matrix(weight), x)
    assert relative_rms(found, x @ weight.reshape(24, 128).astype(mx.float32).T) < TOLERANCE


def test_an_unknown_form_is_refused(library: Library):
    matrix = Pinned().matrix(packed(4, 64, "affine", 256))
    matrix.bits = 7
    assert not library.takes(matrix)
    with pytest.raises(ValueError, match="int32"):
        Pinned().matrix(mx.zeros((4, 4), mx.int32))
