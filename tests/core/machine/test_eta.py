"""Estimates of the seconds left, on a scripted clock."""

import pytest

from qchat.core.machine import eta
from qchat.core.machine.eta import TimeEstimate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose only entry is the time now."""
    now = [100.0]
    monkeypatch.setattr(eta.time, "monotonic", lambda: now[0])
    return now


def test_the_average_speed_excludes_progress_made_before_the_start(clock: list[float]):
    estimate = TimeEstimate(done=50)
    assert estimate.seconds_left(50, 100) is None
    clock[0] += 10
    assert estimate.seconds_left(70, 80) == 40
    clock[0] += 30
    assert estimate.seconds_left(90, 60) == 60


def test_within_a_window_only_the_last_seconds_count(clock: list[float]):
    estimate = TimeEstimate(window=10)
    for _ in range(20):
        clock[0] += 1
        estimate.seconds_left(clock[0] - 100, 100)
    for _ in range(9):
        clock[0] += 1
        estimate.seconds_left(20 + 4 * (clock[0] - 120), 100)
    clock[0] += 1
    assert estimate.seconds_left(60, 100) == 25
    clock[0] += 60
    assert estimate.seconds_left(60, 100) is None
