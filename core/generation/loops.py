"""Notices when a reply has begun to repeat itself endlessly: one span of ids over and over at its end.

A loop is at least `MIN_REPEATS` copies of a span of at most `MAX_SPAN` ids, `MIN_IDS` ids in all, so that a
board of zeros or a ruled table is none. Refuses to guess: spans that change a little never count.
"""

MAX_SPAN = 256
MIN_REPEATS = 4
MIN_IDS = 256
STRIDE = 8
_WINDOW = MAX_SPAN * MIN_REPEATS
# every loop has at least this many ids at its end that stood one span before
_PROBE = MIN_IDS - MIN_IDS // MIN_REPEATS
_CODE_POINTS = 0x110000


class LoopDetector:
    """Fed with every id of one reply; looks at every eighth, in about a microsecond an id."""

    def __init__(self) -> None:
        # ids as characters: str compares and searches them at the speed of memory
        self._tail = ""
        self._new: list[str] = []

    def add(self, token: int) -> bool:
        """True when `token`, or one of the seven before it, completed a loop."""
        self._new.append(chr(token % _CODE_POINTS))
        if len(self._new) < STRIDE:
            return False
        self._tail = (self._tail + "".join(self._new))[-_WINDOW:]
        self._new.clear()
        return self._loops()

    def _loops(self) -> bool:
        """Tries as span each distance, up to `MAX_SPAN`, at which the last `_PROBE` ids stood before."""
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
    """Whether enough of the end of `tail` equals itself moved by `span`."""
    length = max(MIN_REPEATS * span, MIN_IDS)
    return length <= len(tail) and tail[-length:-span] == tail[span - length :]
