"""What ends a reply early: a thinking budget ends the thought, a stop string the reply."""

from collections.abc import Sequence

from .decode import AnyDecoder

# a thought within its last tenth of budget is closed where the model itself nearly would
SOFT_SHARE, SOFT_RANK = 0.9, 3


class ThinkingBudget:
    """Ends a thought at `budget` tokens, or a little earlier if its end is among the likeliest ids."""

    def __init__(self, budget: int | None, close_id: int | None):
        self.budget, self.close_id = budget, close_id

    def close(self, spent: int, decoder: AnyDecoder) -> bool:
        """Force the end of the thought if `spent` reasoning tokens call for it."""
        if self.budget is None or self.close_id is None or spent < SOFT_SHARE * self.budget:
            return False
        if spent < self.budget and decoder.rank(self.close_id) >= SOFT_RANK:
            return False
        decoder.force(self.close_id)
        return True


class StopStrings:
    """Passes text on until one of `stops` appears; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is safe to show by now; it ends before a stop string."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        starts = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back, once the reply has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
