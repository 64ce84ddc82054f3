"""Products, attention and elementwise functions against float64 or against MLX's plain forms."""

import numpy as np
import pytest

from qchat.core.checkpoint.packed import Packed
from qchat.core.machine.backend import Policy, mx
from qchat.core.ops import elementwise
from qchat.core.ops.attention import attention
from qchat.core.ops.linear import (
    DEQUANTIZE_ROWS,
    ColumnLinear,
    Embedding,
    ExpertsLinear,
    make_linear,
    make_projections,
    materialize,
)
from tests.compare import relative_rms

DENSE = Policy(mx.float32, dense=True)
PACKED = Policy(mx.float32, dense=False)
TRIPLES = [
    *((64, bits, "affine") for bits in (2, 3, 4, 5, 6, 8)),
    (32, 4, "mxfp4"),
    (32, 8, "mxfp8"),
    (16, 4, "nvfp4"),
]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def pack(weight: mx.array, triple: tuple[int, int, str]) -> Packed:
    group, bits, mode = triple
    parts = mx.quantize(weight, group, bits, mode=mode)
    return Packed(parts[0], parts[1], parts[2] if mode == "affine" else None, group, bits, mode)  # pyright: ignore[reportArgumentType]


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), dtype=np.float64)


@pytest.mark.parametrize("rows", [1, 2, DEQUANTIZE_ROWS, 40])
@pytest.mark.parametrize("triple", TRIPLES, ids=lambda t: f"{t[2]}{t[1]}")
def test_a_packed_product_equals_the_dequantized_one(triple, rows):
    packed, x = pack(normal(96, 128), triple), normal(1, rows, 128, seed=1)
    wanted = wide(x) @ wide(packed.dequantize(mx.float32)).T
    for policy in (DENSE, PACKED):
        found = make_linear(materialize(packed, policy))(x)
        assert found.dtype == mx.float32
        assert relative_rms(found, wanted) <= 2e-6


@pytest.mark.parametrize("shape", [(1, 1, 128), (1, 128), (1, 7, 128)])
@pytest.mark.parametrize("rows", [5, 9000, 16000])
def test_a_product_in_blocks_of_rows_equals_the_whole(rows, shape):
    weight, x = normal(rows, 128), normal(*shape, seed=1)
    found = ColumnLinear(weight)(x)
    assert found.shape == (*shape[:-1], rows)
    assert relative_rms(found, wide(x) @ wide(weight).T) <= 2e-6


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("policy", [DENSE, PACKED])
def test_joined_projections_equal_single_ones(policy, mixed, rows):
    triples = [(64, 4, "affine"), (64, 8, "affine") if mixed else (64, 4, "affine")]
    packed = [pack(normal(n, 128, seed=n), t) for n, t in zip((32, 96), triples, strict=True)]
    x = normal(1, rows, 128, seed=9)
    for found, weight in zip(make_projections(packed, policy)(x), packed, strict=True):
        assert relative_rms(found, wide(x) @ wide(weight.dequantize(mx.float32)).T) <= 2e-6


@pytest.mark.parametrize("triple", [None, *TRIPLES], ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_experts_equal_a_loop_over_rows(triple, ordered):
    weight = normal(4, 96, 128)
    stored = weight if triple is None else pack(weight, triple)
    dense = weight if isinstance(stored, mx.array) else stored.dequantize(mx.float32)
    x, index = normal(6, 1, 128, seed=2), mx.array([0, 0, 1, 2, 3, 3] if ordered else [3, 0, 2, 2, 1, 0])
    found = ExpertsLinear(stored)(x, index, ordered)
    wanted = [wide(x[i]) @ wide(dense[int(index[i])]).T for i in range(6)]
    assert relative_rms(found, np.stack(wanted)) <= 2e-6


@pytest.mark.parametrize("triple", TRIPLES, ids=lambda t: f"{t[2]}{t[1]}")
def test_a_packed_embedding_gives_the_rows_of_the_dequantized_table(triple):
    packed, ids = pack(normal(50, 128), triple), mx.array([[3, 49, 0]])
    found = Embedding(packed, mx.float32)(ids)
    assert mx.array_equal(found, packed.dequantize(mx.float32)[ids])


@pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 300), (5, 5), (7, 40), (64, 300)])
def test_attention_equals_softmax_in_float64(length, total):
    q, k, v = normal(1, 6, length, 16), normal(1, 2, total, 16, seed=1), normal(1, 2, total, 16, seed=2)
    wanted = np.zeros(q.shape)
    for head in range(6):
        scores = wide(q[0, head]) @ wide(k[0, head // 3]).T / 4
        for i in range(length):
            seen = scores[i, : total - length + i + 1]
            weights = np.exp(seen - seen.max())
            wanted[0, head, i] = (weights / weights.sum()) @ wide(v[0, head // 3])[: len(seen)]
    assert relative_rms(attention(q, k, v, 0.25), wanted) <= 2e-6


def test_the_polynomial_exponential_is_exact_to_float32():
    x = mx.array(np.linspace(elementwise.SMALLEST_EXPONENT, 88, 50_000, dtype=np.float32))
    ratio = wide(elementwise.exp(x)) / np.exp(wide(x))
    assert np.abs(ratio - 1).max() <= 2e-7


def test_the_polynomial_exponential_is_zero_where_products_would_become_subnormal():
    below = np.nextafter(np.float32(elementwise.SMALLEST_EXPONENT), np.float32(-np.inf))
    x = mx.array(np.linspace(-1e4, below, 50_000, dtype=np.float32))
    assert not wide(elementwise.exp(x)).any()
    assert np.exp(np.float64(elementwise.SMALLEST_EXPONENT)) < 1e-26


def test_the_polynomial_is_really_taken_for_many_values(monkeypatch):
    x = normal(elementwise.POLYNOMIAL_FROM)
    if not elementwise.on_gpu():
        monkeypatch.setattr(mx, "exp", None)
        monkeypatch.setattr(mx, "sigmoid", None)
    assert relative_rms(elementwise.exp(x), np.exp(wide(x))) <= 2e-7
    assert relative_rms(elementwise.sigmoid(x), 1 / (1 + np.exp(-wide(x)))) <= 2e-7


def test_the_exponential_of_very_small_numbers_is_all_but_zero():
    x = mx.full((elementwise.POLYNOMIAL_FROM,), -1e30)
    assert float(elementwise.exp(x).max()) < 1e-37
    assert float(elementwise.sigmoid(x).max()) < 1e-37


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("rows", [1, 200])
def test_gates_keep_the_dtype_of_the_stream(dtype, rows):
    a, b = normal(rows, 64).astype(dtype), normal(rows, 64, seed=1).astype(dtype)
    swish = wide(a) / (1 + np.exp(-wide(a))) * wide(b)
    for found, wanted in (
        (elementwise.swiglu(a, b), swish),
        (elementwise.gate_by_sigmoid(b, a), wide(b) / (1 + np.exp(-wide(a)))),
    ):
        assert found.dtype == dtype
        assert relative_rms(found.astype(mx.float32), wanted) <= (2e-7 if dtype == mx.float32 else 5e-3)
