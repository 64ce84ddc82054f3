"""Confidence intervals against the known spread of means."""

import numpy as np
import pytest

from qchat.core.measuring.bootstrap import MOST_STRETCHES, STRETCH, difference_interval, mean_interval

TOKENS = 4096


def test_an_interval_is_as_wide_as_the_spread_of_means():
    values = np.random.default_rng(1).exponential(0.1, TOKENS)
    low, high = mean_interval(values.tolist())
    error = values.std() / TOKENS**0.5
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_tokens_that_fail_together_make_it_wider():
    alone = np.random.default_rng(2).exponential(0.1, TOKENS)
    together = np.repeat(alone[: TOKENS // STRETCH], STRETCH)
    (low, high), (lower, higher) = mean_interval(alone.tolist()), mean_interval(together.tolist())
    assert higher - lower == pytest.approx(STRETCH**0.5 * (high - low), rel=0.3)


def test_nineteen_of_twenty_intervals_hold_the_true_mean():
    draw = np.random.default_rng(3)
    held = [
        low < 1 < high
        for low, high in (mean_interval(draw.exponential(1, 2048).tolist()) for _ in range(200))
    ]
    assert 0.9 < np.mean(held) < 0.99


def test_a_difference_is_known_better_than_its_two_sides():
    draw = np.random.default_rng(4)
    hard = draw.exponential(0.1, TOKENS)  # both models find the same tokens hard
    values, others = hard + 0.01, hard + draw.normal(0, 0.005, TOKENS)
    low, high = difference_interval(values.tolist(), others.tolist())
    assert 0.009 < low < high < 0.011
    widths = [ends[1] - ends[0] for ends in map(mean_interval, (values.tolist(), others.tolist()))]
    assert high - low < min(widths) / 5


@pytest.mark.parametrize("tokens", [1, STRETCH - 1, STRETCH + 1, MOST_STRETCHES * STRETCH + 1])
def test_every_length_has_an_interval(tokens: int):
    assert mean_interval([0.25] * tokens) == (0.25, 0.25)


def test_equal_values_give_equal_intervals():
    values = np.random.default_rng(5).exponential(0.1, 500).tolist()
    assert mean_interval(values) == mean_interval(values)
