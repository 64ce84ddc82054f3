"""Experts that are cast in tiles compute what all at once do."""

import numpy as np
import pytest

from qchat.core.machine.backend import mx
from qchat.core.ops import tiled_experts
from qchat.core.ops.linear import ExpertsLinear
from qchat.core.ops.tiled_experts import TiledExperts


def test_experts_in_tiles_are_the_experts_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiled_experts, "TILE_NBYTES", 4 * 16 * 32 * 3)
    weight = mx.random.normal((8, 16, 32)).astype(mx.bfloat16)
    index = mx.array([0, 0, 1, 4, 4, 4, 7])  # a tile without rows among them
    x = mx.random.normal((7, 1, 32))
    expected = ExpertsLinear(weight)(x, index, True)
    assert np.allclose(TiledExperts(weight)(x, index, True), expected, atol=1e-5)
