"""The gate on a clock of its own: it finds the best number of drafts, and hardly costs where none pays."""

import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from qchat.core.generation.draft_gate import Choice, DraftGate, Source

# the time of a step with 0, 1, 2 and 3 drafts, and the chance of each draft
CURVES: dict[str, tuple[list[float], float]] = {
    "a device with room to spare": ([1, 1.02, 1.04, 1.06], 0.7),
    "a little for each draft": ([1, 1.15, 1.3, 1.45], 0.8),
    "a step at the third": ([1, 1.1, 1.2, 3], 0.7),
    "the second is dear": ([1, 1.15, 2.2, 3.2], 0.7),
    "the first is dear": ([1, 2, 2.1, 2.2], 0.9),
    "as long as one by one": ([1, 2, 3, 4], 0.8),
}
PLAIN_SECONDS = 0.01


class Device:
    """Runs the steps that the gate chooses; `accepts` says by a step's number whether it accepts a draft."""

    def __init__(self, curve: Sequence[float], accepts: Callable[[int], bool]):
        self.curve, self.accepts, self.gate = curve, accepts, DraftGate()
        self.ids = 0
        self.seconds = 0.0
        self.chosen: list[Choice] = []

    def step(self) -> None:
        choice = self.gate.choose("head", 3)
        seconds = PLAIN_SECONDS * self.curve[choice.drafts]
        accepted = 0
        while accepted < choice.drafts and self.accepts(len(self.chosen)):
            accepted += 1
        if choice.drafts:
            self.gate.learn("head", choice, accepted, seconds)
        else:
            self.gate.learn_plain(seconds)
        self.chosen.append(choice)
        self.ids += accepted + 1
        self.seconds += seconds

    def run(self, ids: int) -> float:
        """Return the time of so many ids, relative to no drafts."""
        while self.ids < ids:
            self.step()
        return self.seconds / (self.ids * PLAIN_SECONDS)


def with_chance(chance: float, seed: int) -> Callable[[int], bool]:
    draws = random.Random(seed)
    return lambda _: draws.random() < chance


def true_speed(curve: list[float], chance: float, count: int) -> float:
    return sum(chance**n for n in range(count + 1)) / curve[count]


@pytest.mark.parametrize("name", CURVES)
def test_the_best_number_is_found_within_40_steps(name: str):
    curve, chance = CURVES[name]
    best = max(range(4), key=lambda n: true_speed(curve, chance, n))
    found = 0
    for seed in range(50):
        device = Device(curve, with_chance(chance, seed))
        for _ in range(40):
            device.step()
        later = [device.chosen[-1].drafts for _ in range(30) if device.step() is None]
        found += max(set(later), key=later.count) == best
    assert found >= 46


def worst_cases() -> Iterator[tuple[list[float], Callable[[int], Callable[[int], bool]]]]:
    curves = [curve for curve, _ in CURVES.values()]
    for curve in [*curves, [1, 2.4, 3.8, 5.2], [1, 1.5, 2, 2.5], [1, 3, 6, 10]]:
        for chance in (0.0, 0.2, 0.4, 0.6, 0.8):
            yield curve, lambda seed, chance=chance: with_chance(chance, seed)
        yield curve, lambda _: lambda step: step < 60  # drafts that become useless
        yield curve, lambda _: lambda step: step % 64 < 8  # and that are useful now and then


@pytest.mark.slow
def test_drafts_never_lose_more_than_3_percent_over_400_ids():
    for curve, make in worst_cases():
        for seed in range(20):
            assert Device(curve, make(seed)).run(400) < 1.03, (curve, seed)


def test_drafts_with_little_chance_are_only_retried_now_and_then():
    device = Device([1, 1.1, 1.2, 1.3], lambda _: False)
    for _ in range(200):
        device.step()
    assert sum(choice.drafts for choice in device.chosen[-96:]) == 3
    device.accepts = lambda _: True
    for _ in range(2000):
        device.step()
    assert device.gate.choose("head", 3).drafts == 3
    assert device.gate.choose("head", 2).drafts == 2
    assert device.gate.choose("head", 0).drafts == 0


def test_a_kernel_that_is_compiled_at_first_is_not_taken_for_slow():
    device = Device([1, 1.1, 1.2, 1.3], lambda _: True)
    curve = device.curve
    for _ in range(100):
        choice = device.gate.choose("head", 3)
        is_new = choice.drafts not in {c.drafts for c in device.chosen}
        device.curve = [200.0 * cost if is_new else cost for cost in curve]
        device.step()
    assert device.gate.choose("head", 3).drafts == 3


def test_a_device_that_becomes_slow_at_drafts_is_noticed():
    device = Device([1, 1.1, 1.2, 1.3], with_chance(0.9, 1))
    for _ in range(100):
        device.step()
    assert device.chosen[-1].drafts == 3
    device.curve = [1, 2, 3, 4]
    for _ in range(60):
        device.step()
    assert [choice.drafts for choice in device.chosen[-10:]].count(0) > 7


def test_copies_grow_longer_as_far_as_they_pay():
    """Up to eight ids a step takes hardly longer, with more it takes as long as they would one by one."""
    gate, counts = DraftGate(), []
    cost = {0: 1.0, 1: 1.1, 3: 1.2, 7: 1.4, 16: 17.0}
    for _ in range(200):
        choice = gate.choose("long copy", 16)
        counts.append(choice.drafts)
        if choice.drafts:
            gate.learn("long copy", choice, choice.drafts, PLAIN_SECONDS * cost[choice.drafts])
        else:
            gate.learn_plain(PLAIN_SECONDS)
    assert 7 in counts[:20]
    assert set(counts[100:]) <= {0, 7, 16}
    assert counts[100:].count(16) <= 1 and counts[100:].count(0) <= 3


def test_long_and_short_matches_have_rates_of_their_own_and_times_in_common():
    gate = DraftGate()
    for _ in range(4):
        gate.learn_plain(PLAIN_SECONDS)
    for _ in range(60):
        cases: list[tuple[Source, int]] = [("short copy", 0), ("long copy", 1)]
        for source, share in cases:
            choice = gate.choose(source, 7)
            if choice.drafts:
                gate.learn(source, choice, share * choice.drafts, 1.3 * PLAIN_SECONDS)
    assert gate.choose("long copy", 7).drafts == 7
    assert gate.choose("short copy", 7).drafts <= 1
