"""The choice of one option for each item with the least sum of losses under a limit on the sum of costs.

A Lagrange multiplier orders the steps on the lower convex hulls of all items; they are taken while they fit.
What is left of the limit is spent greedily on any better option that fits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..checkpoint.packed import Geometry


@dataclass(frozen=True)
class Option:
    """One code for an item, the KL that it is predicted to add, and its cost in bytes."""

    code: Geometry
    kl: float
    cost: float


@dataclass(frozen=True)
class _Step:
    """A step of item `item` along its hull to the option `to`."""

    item: int
    to: Option
    gain: float  # in KL per byte


def choose(items: Sequence[Sequence[Option]], limit: float) -> list[Option] | None:
    """Return an option for each item, or None where even the cheapest ones exceed `limit`."""
    chosen = [_hull(options)[0] for options in items]
    left = limit - sum(option.cost for option in chosen)
    if left < 0:
        return None
    for step in _steps(items):
        more = step.to.cost - chosen[step.item].cost
        if more > left:
            break
        chosen[step.item], left = step.to, left - more
    return _spend(items, chosen, left)


def curve(items: Sequence[Sequence[Option]]) -> Iterator[tuple[float, float]]:
    """Yield the sums of cost and KL along all hulls, from the cheapest choice to the best."""
    chosen = [_hull(options)[0] for options in items]
    cost, kl = sum(option.cost for option in chosen), math.fsum(option.kl for option in chosen)
    yield cost, kl
    for step in _steps(items):
        before, chosen[step.item] = chosen[step.item], step.to
        cost += step.to.cost - before.cost
        kl += step.to.kl - before.kl
        yield cost, max(kl, 0.0)


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of KL over cost, the cheapest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        if hull and hull[-1].cost == option.cost:
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: Option, after: Option) -> float:
    """Return the KL that a byte saves."""
    more = after.cost - before.cost
    return (before.kl - after.kl) / more if more > 0 else math.inf


def _steps(items: Sequence[Sequence[Option]]) -> list[_Step]:
    """Return the steps of all items, the best first; those of one item keep their order."""
    steps = [
        _Step(item, after, _gain(before, after))
        for item, hull in enumerate(map(_hull, items))
        for before, after in pairwise(hull)
    ]
    return sorted(steps, key=lambda step: -step.gain)


def _spend(items: Sequence[Sequence[Option]], chosen: list[Option], left: float) -> list[Option]:
    """Take the step that saves most for its bytes, as long as any fits."""
    chosen = list(chosen)
    while True:
        steps = [
            _Step(item, option, _gain(chosen[item], option))
            for item, options in enumerate(items)
            for option in options
            if option.kl < chosen[item].kl and option.cost - chosen[item].cost <= left
        ]
        if not steps:
            return chosen
        best = max(steps, key=lambda step: step.gain)
        left -= best.to.cost - chosen[best.item].cost
        chosen[best.item] = best.to
