"""Estimates of the time remaining, from the progress made so far."""

import math
import time
from collections import deque


class TimeEstimate:
    """Assumes the average speed since the start, or over the last `window` seconds."""

    def __init__(self, done: float = 0, window: float = math.inf):
        """Start the clock now; `done` is the progress made earlier, in any unit."""
        self._window = window
        self._samples = deque([(time.monotonic(), done)])

    def seconds_left(self, done: float, remaining: float) -> float | None:
        """Estimate the seconds until `remaining` more units are done; None while there is no progress yet."""
        now = time.monotonic()
        if math.isfinite(self._window):
            self._samples.append((now, done))
        while now - self._samples[0][0] > self._window:
            self._samples.popleft()
        start, before = self._samples[0]
        return (now - start) * remaining / (done - before) if done > before else None
