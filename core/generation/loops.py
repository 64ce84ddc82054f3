"""Detection of a reply that repeats itself endlessly: the same span of ids over and over at its end.

A loop is at least `MIN_REPEATS` copies of a span of at most `MAX_SPAN` ids, `MIN_IDS` ids in all, so that a
board of zeros or the rule of a table does not count. Nor do spans that change even slightly.
"""

MAX_SPAN = 256
MIN_REPEATS = 4
MIN_IDS = 256
STRIDE = 8
_WINDOW = MAX_SPAN * MIN_REPEATS
# in every loop at least this many ids at the end equal those one span earlier
_PROBE = MIN_IDS - MIN_IDS // MIN_REPEATS
_CODE_POINTS = 0x110000


class LoopDetector:
    """Receives every id of one reply and checks after every eighth; takes about a microsecond an id."""

    def __init__(self) -> None:
        # ids as characters, because str compares and searches at memory speed
        self._tail = ""
        self._new: list[str] = []

    def add(self, token: int) -> bool:
        """Return whether `token`, or one of the seven ids before it, completes a loop."""
        self._new.append(chr(token % _CODE_POINTS))
        if len(self._new) < STRIDE:
            return False
        self._tail = (self._tail + "".join(self._new))[-_WINDOW:]
        self._new.clear()
        return self._loops()

    def _loops(self) -> bool:
        """Try each span up to `MAX_SPAN` at which the last `_PROBE` ids occurred before."""
        tail = self._tail
        here = len(tail) - _PROBE
        if here <= 0:
            return False
        probe = tail[here:]
        place = tail.find(probe, max(0, here - MAX_SPAN))
        while place < here:
            if _repeats(tail, here - place):
                return True
            place = tail.find(probe, place + 1)
        return False


def _repeats(tail: str, span: int) -> bool:
    """Whether a long enough end of `tail` equals itself shifted by `span`."""
    length = max(MIN_REPEATS * span, MIN_IDS)
    return length <= len(tail) and tail[-length:-span] == tail[span - length :]
