"""The fast forms of the gated delta rule against the plain recurrence, and that one against float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.errors import UsageError
from qchat.core.machine.backend import mx
from qchat.core.ops.elementwise import l2_normalise
from qchat.core.ops.gated_delta import _inverse, delta_chunks, delta_mlx, delta_step, gated_delta
from qchat.core.ops.gated_delta_reference import gated_delta_rule
from tests.compare import relative_rms

DK, DV = 32, 16


def draw(seed: int, length: int, heads: int = 2, repeats: int = 2) -> tuple[mx.array, ...]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, dtype=np.float32))

    q, k = normal(1, length, heads, DK), normal(1, length, heads, DK)
    g = -mx.abs(normal(1, length, heads * repeats)) * 0.5
    beta = mx.sigmoid(normal(1, length, heads * repeats))
    v, state = normal(1, length, heads * repeats, DV), normal(1, heads * repeats, DK, DV)
    return l2_normalise(q) * DK**-0.5, l2_normalise(k), v, g, beta, state


def equal_keys_without_decay(length: int) -> tuple[mx.array, ...]:
    """The case in which powers of the chunk matrix grow without bound."""
    q, k, v, g, beta, state = draw(3, length)
    return q, mx.broadcast_to(k[:, :1], k.shape), v, mx.zeros_like(g), mx.ones_like(beta), state


def assert_same(found, wanted, limit: float) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_rms(ours, theirs) <= limit


def in_float64(q, k, v, g, beta, state):
    """Equation 10 of the paper, one head and one step at a time."""
    q, k, v, g, beta, state = (np.array(a, dtype=np.float64)[0] for a in (q, k, v, g, beta, state))
    outputs = np.zeros_like(v)
    for head in range(v.shape[1]):
        key_head = head // (v.shape[1] // k.shape[1])
        s = state[head].T  # [Dv, Dk], as the paper has it
        for t in range(v.shape[0]):
            key, b, a = k[t, key_head], beta[t, head], np.exp(g[t, head])
            s = a * s @ (np.eye(DK) - b * np.outer(key, key)) + b * np.outer(v[t, head], key)
            outputs[t, head] = s @ q[t, key_head]
        state[head] = s.T
    return outputs[None], state[None]


def test_the_reference_is_the_papers_equation():
    arguments = draw(0, 40)
    assert_same(gated_delta_rule(*arguments), in_float64(*arguments), 2e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 16, 32, 64, 128])
@pytest.mark.parametrize("make", [lambda n: draw(1, n), equal_keys_without_decay])
def test_chunks_of_any_length_equal_the_recurrence(chunk, make):
    arguments = make(100)
    assert_same(delta_chunks(*arguments, chunk=chunk), gated_delta_rule(*arguments), 5e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 130), repeats=st.sampled_from([1, 2, 3]))
def test_chunks_equal_the_recurrence_for_random_lengths_and_head_ratios(seed, length, repeats):
    arguments = draw(seed, length, repeats=repeats)
    assert_same(delta_chunks(*arguments, chunk=32), gated_delta_rule(*arguments), 5e-6)


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_one_step_equals_the_recurrence(repeats):
    arguments = draw(5, 1, repeats=repeats)
    assert_same(delta_step(*arguments), gated_delta_rule(*arguments), 2e-6)


@pytest.mark.parametrize("repeats", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 300])
def test_mlxs_own_form_equals_the_recurrence(length: int, repeats: int):
    """Its documentation gives the state another shape; square heads would hide that."""
    arguments = draw(length, length, repeats=repeats)
    assert_same(delta_mlx(*arguments), gated_delta_rule(*arguments), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 2, 3, 4])
def test_mlxs_own_form_equals_float64_over_two_thousand_tokens(repeats: int):
    arguments = draw(9, 2000, heads=1, repeats=repeats)
    assert_same(delta_mlx(*arguments), in_float64(*arguments), 2e-5)


@pytest.mark.parametrize("cut", [1, 7, 64])
def test_mlxs_own_form_continues_from_its_state(cut: int):
    q, k, v, g, beta, state = draw(10, 80, repeats=3)
    begin, after = delta_mlx(q[:, :cut], k[:, :cut], v[:, :cut], g[:, :cut], beta[:, :cut], state)
    end, after = delta_mlx(q[:, cut:], k[:, cut:], v[:, cut:], g[:, cut:], beta[:, cut:], after)
    found = mx.concatenate([begin, end], axis=1), after
    assert_same(found, gated_delta_rule(q, k, v, g, beta, state), 2e-5)


@pytest.mark.parametrize("form", [delta_mlx, lambda *arguments: delta_chunks(*arguments, chunk=32)])
def test_very_strong_decay_forgets_without_overflow(form):
    q, k, v, g, beta, state = draw(6, 80)
    arguments = (q, k, v, mx.full(g.shape, -60.0), beta, state)
    assert_same(form(*arguments), gated_delta_rule(*arguments), 5e-6)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_the_inverse_is_one_for_any_chunk(scale):
    for size in (1, 2, 7, 64):
        strict = np.tril(np.random.default_rng(size).uniform(0, 1, (size, size)), -1) * scale
        inverse = np.array(_inverse(mx.array(strict.astype(np.float32))[None])[0], dtype=np.float64)
        assert relative_rms(inverse, np.linalg.inv(np.eye(size) + strict)) <= 1e-5


def test_the_environment_forces_a_form(monkeypatch):
    arguments = draw(7, 5)
    forms = {}
    for name in ("reference", "chunked", "mlx", "auto"):
        monkeypatch.setenv("QCHAT_DELTA", name)
        forms[name] = gated_delta(*arguments)
    assert mx.array_equal(forms["mlx"][1], delta_mlx(*arguments)[1])
    assert mx.array_equal(forms["reference"][0], gated_delta_rule(*arguments)[0])
    assert mx.array_equal(forms["chunked"][0], forms["auto"][0])
    monkeypatch.setenv("QCHAT_DELTA", "fast")
    with pytest.raises(UsageError, match="QCHAT_DELTA is 'fast'"):
        gated_delta(*arguments)
