"""A clock that a test sets."""


class FakeClock:
    """Return `now`, which each reading first moves on by `step` seconds."""

    def __init__(self, now: float = 0.0, step: float = 0.0):
        self.now, self.step = now, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now
