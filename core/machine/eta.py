"""How long what is under way will still take, from what was done so far."""

import math
import time
from collections import deque


class Pace:
    """An estimate at an even pace: since the beginning, or over the last `window` seconds."""

    def __init__(self, done: float = 0, window: float = math.inf):
        """It begins now, with so much done already."""
        self._window = window
        self._seen = deque([(time.monotonic(), done)])

    def seconds_left(self, done: float, missing: float) -> float | None:
        """Seconds until the `missing` rest is done; None as long as nothing was."""
        now = time.monotonic()
        if math.isfinite(self._window):
            self._seen.append((now, done))
        while now - self._seen[0][0] > self._window:
            self._seen.popleft()
        begin, before = self._seen[0]
        return (now - begin) * missing / (done - before) if done > before else None
