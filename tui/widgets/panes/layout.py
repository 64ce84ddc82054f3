"""The panes in their order, and how they share the rows of the panel."""

from collections.abc import Sequence

from . import branches, context, memory, speed, thinking
from .facts import Pane, PaneFacts

PANES: tuple[Pane, ...] = (speed.PANE, memory.PANE, context.PANE, thinking.PANE, branches.PANE)


def share_rows(panes: Sequence[Pane], facts: PaneFacts, height: int) -> list[tuple[Pane, int]]:
    """Return the panes that fit into `height` rows, titles and the last rule included, and the rows of each.

    The last ones are left out first. Each has its least; what is left goes to each up to what it wants, in
    turns, then to the thought.
    """
    fitting = list(panes)
    while fitting and _least(fitting) > height:
        fitting.pop()
    if not fitting:
        return []
    rows = [pane.least for pane in fitting]
    wanted = [max(pane.wanted(facts), pane.least) for pane in fitting]
    left = height - _least(fitting)
    while left and (short := [place for place, have in enumerate(rows) if have < wanted[place]]):
        for place in short[:left]:
            rows[place] += 1
        left -= len(short[:left])
    for place, pane in enumerate(fitting):
        if pane is thinking.PANE:
            rows[place] += left
    return list(zip(fitting, rows, strict=True))


def _least(panes: Sequence[Pane]) -> int:
    return sum(1 + pane.least for pane in panes) + 1
