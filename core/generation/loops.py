"""Detection of endless repetition, in ids and in sentences.

A loop is the same span of at most `MAX_SPAN` ids over and over at the end of a reply. In a thought, a board
of zeros or the rule of a table is none. In an answer it takes far more than anybody asks for, since equal
lines, rows and zeros may be asked for. Spans that change even slightly are no loop; in a thought `Circles`
finds sentences that keep returning with small changes.
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_SPAN = 256
MIN_REPEATS = 4
MIN_IDS = 256
STRIDE = 8
_CODE_POINTS = 0x110000

# a sentence counts from this many words on: rows, list items and lines of code are shorter
MIN_WORDS = 8
# share of words that two sentences have in common where one is the other with small changes
SIMILARITY = 0.7
# how often it must have come before: an answer may be drafted, checked and polished
MIN_RETURNS = 4
WINDOW, RETURNED = 24, 20  # of the last sentences so many have returned as often
MAX_FAMILIES = 96
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？\n]")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_]+|\d+")
_MAX_SENTENCE = 2000  # characters


@dataclass(frozen=True)
class Limits:
    """The fewest ids of a loop whose span has at most `max_span`."""

    min_ids: int
    max_span: int = MAX_SPAN


THOUGHT = (Limits(MIN_IDS),)
ANSWER = (Limits(960, max_span=1), Limits(4096))


class LoopDetector:
    """Receives every id of one reply and checks after every eighth; takes about a microsecond an id."""

    def __init__(self, limits: Sequence[Limits] = THOUGHT) -> None:
        self._limits = limits
        self._window = max(max(limit.min_ids, MIN_REPEATS * limit.max_span) for limit in limits) + MAX_SPAN
        # ids as characters, because str compares and searches at memory speed
        self._tail = ""
        self._new: list[str] = []

    def add(self, token: int) -> bool:
        """Return whether `token`, or one of the seven ids before it, completes a loop."""
        self._new.append(chr(token % _CODE_POINTS))
        if len(self._new) < STRIDE:
            return False
        self._tail = (self._tail + "".join(self._new))[-self._window :]
        self._new.clear()
        return any(_loops(self._tail, limit) for limit in self._limits)


def _loops(tail: str, limit: Limits) -> bool:
    """Try each span at which the last ids occurred before: as many as equal those one span earlier in any
    loop."""
    probe_length = limit.min_ids - min(limit.max_span, limit.min_ids // MIN_REPEATS)
    here = len(tail) - probe_length
    if here <= 0:
        return False
    probe = tail[here:]
    place = tail.find(probe, max(0, here - limit.max_span))
    while place < here:
        if _repeats(tail, here - place, limit.min_ids):
            return True
        place = tail.find(probe, place + 1)
    return False


def _repeats(tail: str, span: int, min_ids: int) -> bool:
    """Whether a long enough end of `tail` equals itself shifted by `span`."""
    length = max(MIN_REPEATS * span, min_ids)
    return length <= len(tail) and tail[-length:-span] == tail[span - length :]


@dataclass
class _Family:
    """Sentences that differ little: the words of the newest, those of all, and how many said nothing new."""

    words: frozenset[str]
    known: set[str]
    returns: int = 0


@dataclass
class Circles:
    """Receives the text of a thought and notices when it does nothing but return to the same sentences.

    A sentence with a new word is no return, nor is one with other numbers: steps of an enumeration or of a
    calculation have them.
    """

    _rest: str = ""
    _families: deque[_Family] = field(default_factory=lambda: deque(maxlen=MAX_FAMILIES))
    _returned: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, text: str) -> bool:
        """Return whether a sentence that `text` ends completes a circle."""
        *sentences, self._rest = _SENTENCE_END.split(self._rest + text)
        self._rest = self._rest[-_MAX_SENTENCE:]
        verdicts = [self._judge(frozenset(_words(sentence))) for sentence in sentences]
        return True in verdicts

    def _judge(self, words: frozenset[str]) -> bool:
        if len(words) < MIN_WORDS:
            return False
        family = next((one for one in self._families if _similar(one.words, words)), None)
        if family is None:
            self._families.append(_Family(words, set(words)))
            self._returned.append(False)
            return False
        is_return = words <= family.known
        family.words, family.known = words, family.known | words
        family.returns += is_return
        self._returned.append(is_return and family.returns >= MIN_RETURNS)
        return sum(self._returned) >= RETURNED


def _words(sentence: str) -> list[str]:
    return _WORD.findall(sentence.lower())


def _similar(one: frozenset[str], other: frozenset[str]) -> bool:
    common = len(one & other)
    if common < SIMILARITY * (len(one) + len(other) - common):
        return False
    return not any(word.isdecimal() for word in one ^ other)


class LoopGuard:
    """Judges one reply while it is drawn; `circling` is whether its thought was found to circle."""

    def __init__(self, *, enabled: bool):
        self._enabled, self.circling = enabled, False
        self._circles, self._read = Circles(), 0
        self.begin_part()

    def begin_part(self) -> None:
        """Judge anew from here on."""
        self._thought, self._answer = LoopDetector(THOUGHT), LoopDetector(ANSWER)

    def loops(self, token: int, *, thinking: bool) -> bool:
        """Return whether `token` completes a loop in the thought or the answer that it belongs to."""
        return self._enabled and (self._thought if thinking else self._answer).add(token)

    def begins_to_circle(self, thought: str) -> bool:
        """Return whether the thought, whose words so far are `thought`, has just begun to circle."""
        fresh, self._read = thought[self._read :], len(thought)
        if not (self._enabled and fresh) or self.circling:
            return False
        self.circling = self._circles.add(fresh)
        return self.circling
