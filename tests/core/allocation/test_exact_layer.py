"""A layer in which single matrices are rounded: all put back."""

from pathlib import Path

import numpy as np
import pytest

from qchat.core.allocation import exact_layer
from qchat.core.allocation.exact_layer import ExactLayer, round_weight
from qchat.core.checkpoint.packed import AFFINE_BITS, Geometry
from qchat.core.conversion.source import Source
from qchat.core.machine.backend import mx
from qchat.core.quant.rounding import quantize
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("shape", [(16, 128), (4, 6, 128)])
def test_a_rounded_weight_is_what_its_codes_mean(
    bits: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exact_layer, "ROUNDING_NBYTES", 4 * 128 * 7)
    weight, code = mx.random.normal(shape).astype(mx.bfloat16), Geometry(bits, 64, "affine")
    expected = quantize(weight, code).dequantize(mx.float32)
    assert np.allclose(round_weight(weight, code, mx.float32), expected, rtol=0, atol=1e-6)
    assert mx.array_equal(round_weight(weight, code, mx.bfloat16), expected.astype(mx.bfloat16))


@pytest.mark.parametrize("moe", [False, True])
def test_rounding_ends_with_the_block_and_a_large_layer_is_cast_by_its_products(
    moe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_checkpoint(tmp_path / "model", moe=moe)
    source, x = Source.open(tmp_path / "model"), mx.random.normal((2, 64, 64))
    name = "layers.1.mlp.switch_mlp.up_proj" if moe else "layers.1.mlp.up_proj"
    results = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(exact_layer, "DENSE_NBYTES", limit)
        layer = ExactLayer(source, 1)
        before = np.array(layer(x))
        with layer.rounded(
            {name: Geometry(2, 64, "affine"), "layers.2.mlp.up_proj": Geometry(2, 64, "affine")}
        ):
            assert np.abs(np.array(layer(x)) - before).max() > 1e-2
        assert np.array_equal(np.array(layer(x)), before)
        results.append(before)
        layer.close()
    assert np.allclose(*results, atol=1e-4)
