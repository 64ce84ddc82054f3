"""Sampling against a float64 numpy reference that sorts everything, and where settings come from."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qchat.core.errors import ConfigError, UsageError
from qchat.core.generation.sampling import (
    ANSWERING,
    THINKING,
    SamplerState,
    Sampling,
    candidates,
    count_token,
    initial_state,
    make_sampler,
    penalize,
    resolve_sampling,
    sort_top_k,
)
from qchat.core.machine.backend import mx

coarse = st.integers(-8, 8).map(float)  # many ties
fine = st.floats(-20, 20, width=32)
logits_lists = st.one_of(st.lists(coarse, min_size=1, max_size=700), st.lists(fine, min_size=1, max_size=300))
whole_numbers = st.integers(0, 3)


def reference_order(logits: np.ndarray) -> np.ndarray:
    """Ids from the highest logit to the lowest, the lower id first among equals."""
    return np.lexsort((np.arange(len(logits)), -logits))


def reference_penalize(logits: np.ndarray, counts: np.ndarray, s: Sampling) -> np.ndarray:
    out = logits.astype(np.float64)
    for token in np.flatnonzero(counts):
        out[token] = (
            out[token] / s.repetition_penalty if out[token] > 0 else out[token] * s.repetition_penalty
        )
        out[token] -= s.presence_penalty + s.frequency_penalty * counts[token]
    return out


def reference_probs(logits: np.ndarray, s: Sampling) -> tuple[np.ndarray, float]:
    """The probability of each id [V] in float64, and how far the nearest one is from being cut or kept."""
    order = reference_order(logits)
    order = order[: s.top_k] if s.top_k else order
    weights = np.exp((logits[order] - logits[order[0]]) / s.temperature)
    probs = weights / weights.sum()
    before = np.concatenate([[0.0], np.cumsum(probs)[:-1]])
    margin = min(np.abs(before - s.top_p).min(), np.abs(probs / probs[0] - s.min_p).min())
    kept = np.where((before < s.top_p) & (probs >= s.min_p * probs[0]), probs, 0)
    full = np.zeros(len(logits))
    full[order] = kept / kept.sum()
    return full, float(margin)


def probs_of(logits: np.ndarray, s: Sampling) -> np.ndarray:
    scores, ids = candidates(mx.array(logits.astype(np.float32)), s)
    places = np.arange(len(logits)) if ids is None else np.array(ids)
    probs = np.array(mx.softmax(scores))
    full = np.zeros(len(logits))
    full[places] = probs
    return full


@settings(max_examples=150, deadline=None)
@given(logits_lists, st.integers(1, 40))
def test_the_shortlist_equals_the_head_of_a_full_sort(values: list[float], k: int):
    logits = np.array(values, np.float32)
    k = min(k, len(values))
    top, ids = sort_top_k(mx.array(logits), k)
    wanted = reference_order(logits)[:k]
    assert np.array(ids).tolist() == wanted.tolist()
    assert np.array_equal(np.array(top), logits[wanted])


@pytest.mark.parametrize("size", [248_320, 248_077, 4097, 21, 20])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_the_shortlist_is_exact_for_sizes_that_chunks_do_not_divide(size: int, k: int):
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32).round(2)
    k = min(k, size)
    assert np.array(sort_top_k(mx.array(logits), k)[1]).tolist() == reference_order(logits)[:k].tolist()


def test_ids_past_the_vocabulary_are_never_offered():
    logits = np.full(130, -math.inf, np.float32)
    logits[[3, 129]] = [1.0, 2.0]
    assert np.array(sort_top_k(mx.array(logits), 4)[1]).tolist() == [129, 3, 0, 1]


def test_a_top_k_above_the_vocabulary_keeps_all_of_it():
    assert np.array(sort_top_k(mx.array([1.0, 3.0, 2.0]), 20)[1]).tolist() == [1, 2, 0]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(fine, min_size=1, max_size=200),
    st.builds(
        Sampling,
        temperature=st.floats(0.05, 4),
        top_k=st.integers(0, 30),
        top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
        min_p=st.one_of(st.just(0.0), st.floats(0.0, 1)),
    ),
)
def test_the_distribution_equals_the_reference(values: list[float], s: Sampling):
    logits = np.array(values, np.float32)
    wanted, margin = reference_probs(logits.astype(np.float64), s)
    # closer than that, float32 and float64 may differ about one id
    assume(margin > 1e-4 or (s.top_p == 1 and s.min_p == 0))
    # float32 logits of up to 40 apart over a temperature of 0.05 keep about 1e-4 in the exponent
    assert np.abs(probs_of(logits, s) - wanted).max() < 5e-4


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(fine, whole_numbers), min_size=1, max_size=50),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_equal_the_reference(
    pairs: list[tuple[float, int]], repetition: float, presence: float, often: float
):
    s = Sampling(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=often)
    logits, counts = (np.array(column) for column in zip(*pairs, strict=True))
    ours = penalize(mx.array(logits.astype(np.float32)), mx.array(counts.astype(np.int32)), s)
    assert np.allclose(np.array(ours), reference_penalize(logits, counts, s), rtol=1e-5, atol=1e-4)


def generate(s: Sampling, logits: np.ndarray, steps: int) -> list[int]:
    sample, state = make_sampler(s), initial_state(s, len(logits))
    tokens = []
    for _ in range(steps):
        token, state = sample(mx.array(logits.astype(np.float32)), state)
        tokens.append(token)
    return [int(token.item()) for token in tokens]


def test_penalties_count_every_generated_id_however_long_ago():
    """With equal logits, greedy walks through the whole vocabulary before it returns."""
    s = Sampling(temperature=0, presence_penalty=1.0, frequency_penalty=0.5)
    assert generate(s, np.zeros(50), 120) == [*range(50), *range(50), *range(20)]


def test_a_forced_id_is_penalized_like_a_drawn_one():
    s = Sampling(temperature=0, presence_penalty=1.0)
    state = count_token(initial_state(s, 3), 0)
    token, _ = make_sampler(s)(mx.zeros([3]), state)
    assert token.item() == 1


def test_counting_nothing_costs_no_array():
    state = initial_state(THINKING, 1000)
    assert state.counts is None
    assert count_token(state, 5) is state


@pytest.mark.parametrize("s", [Sampling(temperature=0), Sampling(top_p=0), Sampling(temperature=0, top_k=5)])
def test_temperature_or_top_p_of_zero_takes_the_most_likely_id(s: Sampling):
    logits = np.random.default_rng(1).normal(size=999)
    assert generate(s, logits, 5) == [int(logits.argmax())] * 5


@pytest.mark.parametrize("s", [THINKING, ANSWERING, Sampling(), Sampling(top_p=0.9), Sampling(min_p=0.1)])
def test_equal_seeds_give_equal_ids_and_others_do_not(s: Sampling):
    logits = np.random.default_rng(2).normal(size=500)
    runs = [generate(Sampling(**{**vars(s), "seed": seed}), logits, 40) for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    assert generate(s, logits, 40) != generate(s, logits, 40)


def test_a_seed_may_use_all_its_bits():
    logits = np.zeros(1000)
    low, high = (generate(Sampling(seed=seed), logits, 20) for seed in (1, 1 + (1 << 62)))
    assert low != high


def test_an_unwanted_draw_is_undone_by_keeping_the_old_state():
    s = Sampling(seed=3, frequency_penalty=1.0)
    sample, state = make_sampler(s), initial_state(s, 100)
    logits = mx.random.normal([100], key=mx.random.key(0))
    first, _ = sample(logits, state)
    again, _ = sample(logits, state)
    assert first.item() == again.item()


@pytest.mark.slow
def test_draws_follow_the_distribution():
    s = Sampling(temperature=0.8, top_k=6, top_p=0.95, seed=11)
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0] + [-9.0] * 100)
    wanted, _ = reference_probs(logits, s)
    n = 4000
    frequencies = np.bincount(generate(s, logits, n), minlength=len(logits)) / n
    assert (frequencies[wanted == 0] == 0).all()
    # five standard deviations of a count_token
    assert (np.abs(frequencies - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / n) + 1e-12).all()


@pytest.mark.parametrize("s", [THINKING, ANSWERING, Sampling(temperature=0), Sampling(top_p=0.9, min_p=0.1)])
def test_sampling_never_waits_for_the_device(s: Sampling):
    """Tracing refuses to evaluate anything, so a sampler that can be traced is lazy."""
    s = Sampling(**{**vars(s), "repetition_penalty": 1.1})
    state = initial_state(s, 300)

    def step(logits: mx.array, key: mx.array, counts: mx.array | None) -> mx.array:
        return make_sampler(s)(logits, SamplerState(key, counts))[0]

    traced = mx.compile(step)(mx.zeros([300]), *state)
    assert traced.shape == ()


def test_half_precision_logits_are_penalized_in_float32():
    s = Sampling(temperature=0, presence_penalty=0.01)
    state = count_token(initial_state(s, 2), 0)
    token, _ = make_sampler(s)(mx.array([64.0, 64.0], mx.bfloat16), state)
    assert token.item() == 1


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 100])
def test_extreme_temperatures_stay_finite(temperature: float):
    logits = mx.array([1000.0, -1000.0, 999.0])
    for s in (Sampling(temperature=temperature), Sampling(temperature=temperature, top_k=2, top_p=0.5)):
        scores, _ = candidates(logits, s)
        assert np.isfinite(np.array(mx.softmax(scores))).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("repetition_penalty", 0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", "1"),
        ("seed", -1),
        ("seed", 1 << 63),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_range(name: str, value: object):
    with pytest.raises(UsageError, match=rf"^{name} is .*, wanted a .*number from .* to .*$"):
        resolve_sampling({name: value}, {}, thinking=True)
    if name != "seed":
        with pytest.raises(ConfigError, match=rf"^generation_config.json: {name} is "):
            resolve_sampling({}, {name: value}, thinking=True)


@pytest.mark.parametrize(
    ("name", "bad", "good"), [("top_k", -1, 20), ("top_k", "x", 0), ("temperature", -3, 0)]
)
def test_a_bad_value_of_the_file_is_overridden_by_a_setting(name: str, bad: object, good: float):
    assert getattr(resolve_sampling({name: good}, {name: bad}, thinking=True), name) == good
    with pytest.raises(ConfigError, match="a setting of your own overrides it"):
        resolve_sampling({"min_p": 0.1}, {name: bad}, thinking=True)
    with pytest.raises(UsageError, match=f"^{name} is "):
        resolve_sampling({name: "hot"}, {name: bad}, thinking=True)


@pytest.mark.parametrize(
    ("request_", "file", "thinking", "wanted"),
    [
        ({}, {}, True, THINKING),
        ({}, {}, False, ANSWERING),
        ({"top_k": None}, {"top_k": None, "eos_token_id": 3}, True, THINKING),
        ({"top_p": 0.5}, {"top_p": 0.9, "temperature": 0.6}, True, Sampling(0.6, 20, 0.5)),
        ({}, {"seed": 4}, True, THINKING),
        ({"temperature": 0}, {"top_k": 7}, False, Sampling(temperature=0, top_k=7)),
        (
            {"temperature": 0, "presence_penalty": 0.3},
            {},
            False,
            Sampling(temperature=0, presence_penalty=0.3),
        ),
        ({}, {"do_sample": False, "temperature": 0.6}, True, Sampling(temperature=0)),
        ({"temperature": 0.5}, {"do_sample": False}, True, Sampling(0.5, 20, 0.95)),
        ({"seed": 4, "max_new_tokens": 9}, {}, True, Sampling(1.0, 20, 0.95, seed=4)),
    ],
)
def test_a_setting_comes_from_the_request_else_the_file_else_the_preset(
    request_: dict, file: dict, thinking: bool, wanted: Sampling
):
    assert resolve_sampling(request_, file, thinking) == wanted
