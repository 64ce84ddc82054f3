"""What lies between a prompt's products in C, against float64."""

import numpy as np
import pytest

from qchat.core.machine.backend import mx
from qchat.core.native.library import Library
from tests.compare import relative_rms

TOLERANCE = 3e-7
# whole vectors of 16, a rest, and a rest alone
WIDTHS = (64, 40, 7)
# less than a share of a thread, and several
ROWS = (1, 16, 37)


def draw(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def wide(array: mx.array) -> np.ndarray:
    return np.array(array, np.float64)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_the_norm_of_rows(library: Library, rows: int, width: int):
    x, weight = draw(rows, width), draw(width)
    expected = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6) * wide(weight)
    assert relative_rms(library.norm(x, weight, 1e-6), expected) < TOLERANCE


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_gates_may_be_slices(library: Library, rows: int, width: int):
    gate, up = mx.split(4 * draw(rows, 2 * width), 2, axis=-1)
    expected = wide(gate) / (1 + np.exp(-wide(gate))) * wide(up)
    assert relative_rms(library.gate(gate, up), expected) < TOLERANCE


@pytest.mark.parametrize(("tokens", "earlier"), [(1, 0), (5, 0), (33, 0), (7, 90), (40, 25)])
def test_a_softmax_over_what_each_token_sees(library: Library, tokens: int, earlier: int):
    scores = 8 * draw(1, 3, tokens, earlier + tokens)
    unseen = np.triu(np.full((tokens, earlier + tokens), -np.inf), earlier + 1)
    weights = np.exp(wide(scores) + unseen)
    expected = weights / weights.sum(-1, keepdims=True)
    found = library.softmax(scores + 0)
    assert relative_rms(found, expected) < TOLERANCE
    assert np.array(found)[..., np.isinf(unseen)].max(initial=0) == 0


def test_far_smaller_weights_than_the_largest_are_zero_and_never_subnormal(library: Library):
    scores = mx.array([[[0.0, -59.0, -61.0, -88.0, -1000.0] * 8]])
    found = np.array(library.softmax(scores))[0, 0]
    assert found[found != 0].min() > 1e-27
    assert np.count_nonzero(found) == 16
