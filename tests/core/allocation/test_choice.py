"""The choice under a limit, and the law that predicts what was not measured."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.allocation.choice import Option, choose, curve
from qchat.core.allocation.law import predicted_kl
from qchat.core.checkpoint.packed import Geometry

CODES = [Geometry(bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)]


def random_items(count: int, seed: int) -> list[list[Option]]:
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        size, loss = draw.randrange(10, 1000), draw.random()
        items.append(
            [Option(code, loss * draw.uniform(3, 5) ** -code.bits, size * code.bits) for code in CODES]
        )
    return items


def loss(chosen: list[Option]) -> float:
    return sum(option.kl for option in chosen)


def cost(chosen: list[Option]) -> float:
    return sum(option.cost for option in chosen)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 1000), st.floats(0, 1.2))
def test_the_limit_is_kept_and_nothing_better_fits_into_what_is_left(count: int, seed: int, share: float):
    items = random_items(count, seed)
    least = sum(min(option.cost for option in options) for options in items)
    most = sum(max(option.cost for option in options) for options in items)
    limit = least + share * (most - least)
    chosen = choose(items, limit)
    assert chosen is not None
    assert cost(chosen) <= limit
    for options, taken in zip(items, chosen, strict=True):
        better = [option for option in options if option.kl < taken.kl]
        assert all(cost(chosen) + option.cost - taken.cost > limit for option in better)
    assert choose(items, least - 1) is None


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_close_to_the_best_of_all(seed: int):
    items = random_items(4, seed)
    limit = sum(option.cost for options in items for option in options) / len(CODES)
    best = min(loss(list(some)) for some in itertools.product(*items) if cost(list(some)) <= limit)
    chosen = choose(items, limit)
    assert chosen is not None
    assert best <= loss(chosen) <= 1.3 * best


def test_the_curve_falls_and_more_bytes_never_give_a_worse_choice():
    items = random_items(20, 3)
    points = list(curve(items))
    assert points == sorted(points, key=lambda point: (point[0], -point[1]))
    limits = range(int(points[0][0]) + 1, int(points[-1][0]), 500)
    losses = [loss(chosen) for limit in limits if (chosen := choose(items, limit)) is not None]
    assert len(losses) == len(limits)
    on_curve = [min(kl for size, kl in points if size <= limit) for limit in limits]
    assert all(found <= drawn + 1e-12 for found, drawn in zip(losses, on_curve, strict=True))


def test_unmeasured_codes_follow_the_error_law():
    measured = {Geometry(bits, 64, "affine"): 4.0**-bits for bits in (2, 3, 4)}
    measured[Geometry(3, 128, "affine")] = 1.5 * 4.0**-3
    measured[Geometry(3, 32, "affine")] = 1.1 * 4.0**-3  # noise: a smaller group cannot be worse
    law = predicted_kl(measured, 256)
    assert law[Geometry(4, 64, "affine")] == 4.0**-4
    assert law[Geometry(6, 64, "affine")] == pytest.approx(4.0**-6)
    assert law[Geometry(8, 128, "affine")] == pytest.approx(1.5 * 4.0**-8)
    assert law[Geometry(4, 32, "affine")] == pytest.approx(4.0**-4)
    assert len(law) == 18


def test_codes_that_do_not_fit_the_rows_are_no_options():
    law = predicted_kl({Geometry(bits, 32, "affine"): 4.0**-bits for bits in (2, 3, 4)}, 96)
    assert {code.group_size for code in law} == {32}
