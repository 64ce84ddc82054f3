"""Early ends: of a thought that reaches its token budget, and of an answer at a stop string."""

from collections.abc import Sequence

from .decode import AnyDecoder

CIRCLING_TOKENS = 128  # left to a thought that circles
# in the last tenth of its budget a thought is closed where its end is among the 3 likeliest ids
SOFT_SHARE, SOFT_RANK = 0.9, 3


class ThinkingBudget:
    """Ends a thought at `budget` tokens, or slightly earlier where the model itself is likely to end it."""

    def __init__(self, budget: int | None, close_id: int | None):
        """`close_id` ends a thought; None for either means no limit."""
        self.budget, self.close_id = budget, close_id
        self._soft_from = SOFT_SHARE * (budget or 0)

    def tighten(self, spent: int) -> None:
        """Have the thought end soon after `spent` reasoning tokens, if possible where the model would."""
        limit = spent + CIRCLING_TOKENS
        self.budget = limit if self.budget is None else min(self.budget, limit)
        self._soft_from = min(self._soft_from, spent)

    def enforce(self, spent: int, decoder: AnyDecoder) -> bool:
        """Force the end of the thought if it is due after `spent` reasoning tokens; returns whether it is."""
        if self.budget is None or self.close_id is None or spent < self._soft_from:
            return False
        if spent < self.budget and decoder.rank(self.close_id) >= SOFT_RANK:
            return False
        decoder.force(self.close_id)
        return True


class StopStrings:
    """Passes text through until it contains one of `stops`; holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found, self.matched = False, ""  # the stop string that was found
        self.passed = 0  # characters before the stop string, or so far

    def add(self, text: str) -> str:
        """Return the text, held-back text first, that is certain to come before any stop string."""
        if self.found:
            return ""
        certain = self._certain(text) if self._stops else text
        self.passed += len(certain)
        return certain

    def _certain(self, text: str) -> str:
        text = self._held + text
        starts = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if starts:
            start, self.matched = min(starts)
            self.found, self._held = True, ""
            return text[:start]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the held-back text at the end of the answer."""
        held, self._held = self._held, ""
        self.passed += len(held)
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
