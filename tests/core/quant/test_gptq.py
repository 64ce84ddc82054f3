"""Rounding that compensates: against the formula, against plain rounding, and where inputs are missing."""

import numpy as np
import pytest

from qchat.core.checkpoint.packed import Geometry
from qchat.core.machine.backend import mx
from qchat.core.quant import gptq
from qchat.core.quant.gptq import DAMPING, Factor, compensate, cut_lower, factorise
from qchat.core.quant.rounding import quantize

CODES = [
    *(Geometry(bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)),
    Geometry(4, 32, "mxfp4"),
    Geometry(8, 32, "mxfp8"),
    Geometry(4, 16, "nvfp4"),
]


def inputs(rows: int = 512, width: int = 128, seed: int = 0) -> mx.array:
    """Correlated inputs, as a layer has them."""
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(rows, 24)) @ draw.normal(size=(24, width)) + 0.3 * draw.normal(
        size=(rows, width)
    )
    return mx.array((mixed * np.exp(draw.normal(size=width))).astype(np.float32))


def weights(*shape: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_t(4, shape).astype(np.float32) * 0.05)


def factor_of(*x: mx.array) -> Factor:
    return factorise(cut_lower(mx.stack([rows[:, ::-1].T @ rows[:, ::-1] for rows in x])))


def output_error(x: mx.array, weight: mx.array, back: mx.array) -> float:
    return float(mx.square(x @ (weight - back).T).sum())


@pytest.mark.parametrize("code", CODES, ids=str)
def test_the_outputs_are_closer_than_with_weighted_rounding(code: Geometry):
    x, weight = inputs(), weights(96, 128)
    factor = factor_of(x)
    ours = compensate(weight, code, factor)
    weighted = quantize(weight, code, factor.diagonal[0], method="weighted")
    assert ours.geometry == code
    errors = [output_error(x, weight, packed.dequantize(mx.float32)) for packed in (ours, weighted)]
    assert errors[0] < 0.6 * errors[1]


def test_the_codes_are_those_of_the_formula():
    """Column by column with the inverse of H, in float64; scales are taken from the result."""
    x, weight, code = inputs(), weights(8, 128), Geometry(4, 64, "affine")
    packed = compensate(weight, code, factor_of(x))
    assert packed.biases is not None
    hessian = np.array(x, np.float64).T @ np.array(x, np.float64)
    hessian += np.eye(128) * DAMPING * hessian.diagonal().mean()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    rest, found = np.array(weight, np.float64), np.zeros((8, 128))
    for j in range(128):
        scale, bias = (
            np.array(part.astype(mx.float32))[:, j // 64] for part in (packed.scales, packed.biases)
        )
        found[:, j] = np.clip(np.round((rest[:, j] - bias) / scale), 0, 15) * scale + bias
        rest[:, j:] -= ((rest[:, j] - found[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    same = np.isclose(found, np.array(packed.dequantize(mx.float32)), atol=1e-5)
    assert same.mean() > 0.99  # float32 decides a few near ties otherwise, and later columns follow


def test_a_factor_made_in_blocks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    x, size = [inputs(seed=seed) for seed in (2, 3)], 128
    hessians = [np.array(rows, np.float64).T @ np.array(rows, np.float64) for rows in x]
    for block in (32, 96, 1024):
        monkeypatch.setattr(gptq, "BLOCK", block)
        factor = factor_of(*x)
        for expert, hessian in enumerate(hessians):
            damped = hessian + np.eye(size) * DAMPING * hessian.diagonal().mean()
            upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # H = R R^T
            for begin in range(0, size, 32):
                end, scale = begin + 32, np.abs(upper).max()
                above = np.array(factor.above(begin, end))[expert]
                assert np.allclose(above, upper[:begin, begin:end], atol=1e-5 * scale)
                inverse = np.array(factor.inverse(begin, end))[expert]
                assert np.allclose(inverse @ upper[begin:end, begin:end], np.eye(32), atol=1e-3)


def test_a_factor_takes_little_more_memory_than_half_of_the_matrix_that_it_is_of(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(gptq, "BLOCK", 64)
    x = inputs(width=1024)
    rows = [mx.contiguous(row) for row in cut_lower((x.T @ x)[None])]
    mx.eval(rows)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    factor = factorise(rows)
    assert mx.get_peak_memory() - before < 0.75 * 4 * 1024 * 1024
    assert len(factor.rows) == 16


def test_inputs_that_are_independent_leave_weighted_rounding():
    x, weight, code = inputs(), weights(40, 128), Geometry(3, 64, "affine")
    diagonal = mx.square(x).sum(axis=0)
    packed = compensate(weight, code, factorise(cut_lower(mx.diag(diagonal[::-1])[None])))
    wanted = quantize(weight, code, diagonal)
    assert all(mx.array_equal(a, b) for a, b in zip(packed.arrays, wanted.arrays, strict=True))


def test_each_expert_has_a_factor_of_its_own():
    x, weight, code = [inputs(seed=seed) for seed in (2, 3, 4)], weights(3, 16, 128), Geometry(4, 32, "mxfp4")
    stack = compensate(weight, code, factor_of(*x))
    for expert in range(3):
        alone = compensate(weight[expert], code, factor_of(x[expert])).dequantize(mx.float32)
        assert (stack.dequantize(mx.float32)[expert] == alone).mean() > 0.99


def test_inputs_that_are_always_zero_or_fewer_than_the_columns_do_no_harm():
    x, weight, code = inputs(rows=5), weights(16, 128), Geometry(4, 64, "affine")
    x[:, 7] = 0
    for rows in (x, mx.zeros_like(x)):
        packed = compensate(weight, code, factor_of(rows))
        assert all(mx.isfinite(array).all() for array in packed.arrays[1:])
        back = packed.dequantize(mx.float32)
        assert float(mx.square(weight - back).sum() / mx.square(weight).sum()) < 0.2
