"""Weights in tiles compute what the whole weights do."""

import numpy as np
import pytest

from qchat.core.checkpoint.packed import Geometry
from qchat.core.machine.backend import mx
from qchat.core.ops import tiled
from qchat.core.ops.linear import ExpertsLinear
from qchat.core.ops.tiled import TiledExperts, TiledLinear
from qchat.core.quant.rounding import quantize


def test_experts_in_tiles_are_the_experts_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiled, "TILE_NBYTES", 4 * 16 * 32 * 3)
    weight = mx.random.normal((8, 16, 32)).astype(mx.bfloat16)
    index = mx.array([0, 0, 1, 4, 4, 4, 7])  # a tile without rows among them
    x = mx.random.normal((7, 1, 32))
    expected = ExpertsLinear(weight)(x, index, True)
    assert np.allclose(TiledExperts(weight)(x, index, True), expected, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 3, 8])
def test_a_product_in_tiles_is_the_product_at_once(bits: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiled, "TILE_NBYTES", 4 * 128 * 7)
    dense = mx.random.normal((40, 128)).astype(mx.bfloat16)
    weight = dense if bits is None else quantize(dense, Geometry(bits, 64, "affine"), dtype=mx.float32)
    x = mx.random.normal((2, 5, 128))
    whole = dense.astype(mx.float32) if isinstance(weight, mx.array) else weight.dequantize(mx.float32)
    assert np.allclose(TiledLinear(weight)(x), x @ whole.T, atol=1e-4)
