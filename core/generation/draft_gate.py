"""Chooses how many drafts a step verifies: the number with the most ids per second, which may be 0.

A step with n drafts yields 1 + r1 + r1 r2 + ... ids, where r are the acceptance rates by place, and takes a
time that was measured on this device, with this model, at about this context. Other numbers are tried now and
then. An account of the time that drafts have gained and lost pays for that, so that a device on which drafts
never pay loses hardly any; while it is overdrawn, nothing is drafted.
"""

from collections.abc import Iterator
from itertools import accumulate
from operator import mul
from typing import Literal, NamedTuple

Source = Literal["head", "short copy", "long copy"]

# the numbers of drafts to choose from
COUNTS: dict[Source, tuple[int, ...]] = {
    "head": (1, 2, 3),
    "short copy": (1, 3, 7, 16),
    "long copy": (1, 3, 7, 16),
}
MAX_DRAFTS = 16
# an acceptance rate before any outcome, and how many outcomes that assumption is worth
INITIAL_RATE, INITIAL_WEIGHT = 0.8, 2
# weight of the newest outcome in a rate, and of the newest time in a mean
RATE_SHARE, TIME_SHARE = 0.05, 0.1
# a time is counted as at most so many times the mean
PAUSE = 4
# drafts must promise so many times the speed of decoding without them
MARGIN = 1.02
# steps between two tries of a number that was never measured, and of others
NEW_TRY_STEPS, TRY_STEPS = 4, 32
# a step is charged at most so many steps for each id it reads when it is measured for the first time
DEAREST = 2
# after so many steps with drafts the time of a step without is measured again
PLAIN_STEPS = 256
# the account, in steps without drafts: its first balance, its limits, and what each step adds
OPENING, LEAST, MOST, INCOME = 6.0, -4.0, 32.0, 0.005


class MeanTime:
    """A moving mean of seconds; neither the first run of a kernel nor a pause of the machine spoils it."""

    def __init__(self) -> None:
        self.seconds, self.count = 0.0, 0

    def add(self, seconds: float) -> float:
        """Learn a time; return it, or as much as it counts for."""
        self.count += 1
        if self.count == 1:
            self.seconds = seconds
        elif self.count == 2:
            self.seconds = min(self.seconds, seconds)
        else:
            seconds = min(seconds, PAUSE * self.seconds)
            self.seconds += TIME_SHARE * (seconds - self.seconds)
        return seconds


class Rates:
    """Moving shares of accepted drafts, by place; a place that was never tried has the rate before it."""

    def __init__(self, places: int) -> None:
        self._rates, self._counts = [INITIAL_RATE] * places, [0] * places

    def add(self, drafted: int, accepted: int) -> None:
        """Learn from a step that accepted the first `accepted` of `drafted` drafts."""
        for place in range(min(drafted, accepted + 1)):
            self._counts[place] += 1
            share = max(RATE_SHARE, 1 / (self._counts[place] + INITIAL_WEIGHT))
            self._rates[place] += share * ((place < accepted) - self._rates[place])

    def expected_ids(self, drafts: int) -> float:
        """Return how many ids a step with so many drafts yields on average."""
        rates: list[float] = []
        for rate, count in zip(self._rates[:drafts], self._counts, strict=False):
            rates.append(rate if count or not rates else rates[-1])
        return 1 + sum(accumulate(rates, mul))


class Choice(NamedTuple):
    """So many drafts for a step, with the speed that they promise, relative to none.

    `rival` is the speed of the best number known, where this one is tried in its place, otherwise 0.
    """

    drafts: int = 0
    speed: float = 1.0
    rival: float = 0.0


NO_DRAFTS = Choice()


class DraftGate:
    """What was learned about drafts on one device with one model; outlives replies."""

    def __init__(self) -> None:
        self._plain = MeanTime()
        self._since_plain = 0
        self._rates = {source: Rates(counts[-1]) for source, counts in COUNTS.items()}
        self._since_try = dict.fromkeys(COUNTS, TRY_STEPS)
        head: dict[int, MeanTime] = {}
        copies: dict[int, MeanTime] = {}  # which take the same time, however likely they are
        self._times: dict[Source, dict[int, MeanTime]] = {
            "head": head,
            "short copy": copies,
            "long copy": copies,
        }
        self._account = OPENING

    @property
    def plain_seconds(self) -> float:
        """Seconds of a step without drafts; 0 before any was measured."""
        return self._plain.seconds

    def choose(self, source: Source, limit: int) -> Choice:
        """Return how many drafts of `source`, at most `limit`, the next step should verify."""
        if self._plain.count < 2 or self._since_plain > PLAIN_STEPS or self._account < 0:
            return NO_DRAFTS
        counts = [n for n in COUNTS[source] if n <= limit]
        known = [Choice(n, self._speed(source, n)) for n in counts if n in self._times[source]]
        best = max([NO_DRAFTS, *(c for c in known if c.speed >= MARGIN)], key=lambda choice: choice.speed)
        affordable = (n for n in self._tries(source, counts, best) if self._account >= self._risk(source, n))
        other = next(affordable, 0)
        return Choice(other, self._speed(source, other), rival=best.speed) if other else best

    def learn_plain(self, seconds: float | None) -> None:
        """Learn from a step without drafts; None where its time says nothing."""
        if seconds is not None:
            self._plain.add(seconds)
            self._since_plain = 0
        self._finish_step(INCOME)

    def learn(self, source: Source, choice: Choice, accepted: int, seconds: float) -> None:
        """Learn from a step with the drafts of `choice`, of which the first `accepted` were accepted."""
        time = self._times[source].setdefault(choice.drafts, MeanTime())
        seconds = time.add(seconds)
        self._rates[source].add(choice.drafts, accepted)
        if time.count == 1:  # which may include the compilation of a kernel
            seconds = min(seconds, DEAREST * (choice.drafts + 1) * self._plain.seconds)
        cost = seconds / self._plain.seconds
        self._since_plain += 1
        self._finish_step(INCOME + accepted + 1 - cost)
        if choice.rival:  # a try that succeeds is repeated at once
            succeeded = accepted == choice.drafts and accepted + 1 > MARGIN * choice.rival * cost
            self._since_try[source] = TRY_STEPS if succeeded else 0

    def _finish_step(self, gain: float) -> None:
        self._account = min(max(self._account + gain, LEAST), MOST)
        for source in self._since_try:
            self._since_try[source] += 1

    def _tries(self, source: Source, counts: list[int], best: Choice) -> Iterator[int]:
        """Yield the numbers that are due to be tried in place of the best one."""
        times, since = self._times[source], self._since_try[source]
        new = next((n for n in counts if n not in times), 0)
        if new and (since >= NEW_TRY_STEPS or self._speed(source, new) > MARGIN * best.speed):
            yield new
        if since >= TRY_STEPS:
            yield from (n for n in counts if n in times and times[n].count < 2)
        more = next((n for n in counts if n > best.drafts and n in times), 0)
        if more and since >= TRY_STEPS * max(1.0, self._loss(source, more, best)):
            yield more

    def _speed(self, source: Source, count: int) -> float:
        """Return the speed with so many drafts, relative to none."""
        return self._rates[source].expected_ids(count) / self._cost(source, count)

    def _cost(self, source: Source, count: int) -> float:
        """Return the time of a step with so many drafts, relative to none.

        Where it was never measured it is on the line through the two nearest smaller numbers that were.
        """
        times, plain = self._times[source], self._plain.seconds
        if count in times:
            return times[count].seconds / plain
        known = [(0, 1.0), *((n, times[n].seconds / plain) for n in sorted(times) if n < count)]
        (m, before), (n, last) = known[-2] if len(known) > 1 else (-1, 0.0), known[-1]
        return last + (count - n) * max(last - before, 0.0) / (n - m)

    def _risk(self, source: Source, count: int) -> float:
        """Return what a step with so many drafts may lose, in steps without.

        One that was never measured is expected to take as long as its ids one by one, or longer.
        """
        time = self._times[source].get(count)
        if time and time.count > 1:
            return time.seconds / self._plain.seconds - 1
        loss = min(self._cost(source, count), DEAREST * (count + 1)) - 1
        return loss if time else max(loss, count)

    def _loss(self, source: Source, count: int, best: Choice) -> float:
        """Return how much longer the ids of a step with so many drafts take than with the best number."""
        cost = self._risk(source, count) + 1
        return cost - self._rates[source].expected_ids(count) / best.speed
