"""Estimates of the seconds left, on a clock of their own."""

import pytest

from qchat.core.machine import eta
from qchat.core.machine.eta import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time now, in its only entry."""
    now = [100.0]
    monkeypatch.setattr(eta.time, "monotonic", lambda: now[0])
    return now


def test_an_even_pace_counts_from_the_beginning_and_from_what_was_done_before(clock: list[float]):
    made = Pace(done=50)
    assert made.seconds_left(50, 100) is None
    clock[0] += 10
    assert made.seconds_left(70, 80) == 40
    clock[0] += 30
    assert made.seconds_left(90, 60) == 60


def test_within_a_window_only_the_last_seconds_count(clock: list[float]):
    made = Pace(window=10)
    for _ in range(20):
        clock[0] += 1
        made.seconds_left(clock[0] - 100, 100)
    for _ in range(9):
        clock[0] += 1
        made.seconds_left(20 + 4 * (clock[0] - 120), 100)
    clock[0] += 1
    assert made.seconds_left(60, 100) == 25
    clock[0] += 60
    assert made.seconds_left(60, 100) is None
