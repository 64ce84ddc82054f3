"""Prefill in chunks, and decoding that computes one step ahead of the id it returns.

Knows nothing of messages, templates or text.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence

from ..errors import UsageError
from ..machine.backend import mx, on_gpu
from ..model.cache import Cache
from ..model.network import MixedTokens, Model
from .constraint import Constraint
from .draft_gate import MAX_DRAFTS
from .draft_head import prefill_draft_head
from .sampling import Sampling, count_token, initial_state, make_sampler
from .speculate import DraftFigures, DraftMemory, SpeculativeDecoder

# small enough to cancel promptly during prefill, large enough for matrix products at full speed
PREFILL_CHUNK, GPU_PREFILL_CHUNK = 512, 2048
FIRST_TIMED_CHUNK = 8
QUICK = 0.9  # of the time that a chunk may take


class TimedChunks:
    """The size of chunks that take about `seconds` each, by the time that the last one took."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter):
        self.size, self._seconds, self._clock = FIRST_TIMED_CHUNK, seconds, clock
        self._begun = 0.0

    def begin(self) -> None:
        """Begin to read a chunk."""
        self._begun = self._clock()

    def end(self, tokens: int) -> None:
        """End reading a chunk of `tokens`: the next one is larger or smaller, at most twice as large.

        A part of the time is the same for every size, so a chunk that was quick grows by one at least.
        """
        seconds = max(self._clock() - self._begun, 1e-6)
        least = tokens + 1 if seconds < QUICK * self._seconds else 1
        self.size = min(max(least, int(tokens * self._seconds / seconds)), 2 * self.size)


def prefill(
    model: Model,
    cache: Cache,
    ids: Sequence[int],
    cancelled: Callable[[], bool] = lambda: False,
    *,
    drafts: bool = False,
    timed: TimedChunks | None = None,
    mixed: Callable[[int, int], MixedTokens | None] | None = None,
) -> Iterator[int]:
    """Read `ids` into the cache in chunks; yields how many ids have been read after each.

    Where some stand for pictures, `mixed` returns those from one place to another as the network reads them,
    or None for a chunk of text. Stops between two chunks when `cancelled()`. With `drafts` the draft head
    reads the last chunk too. With `timed` chunks are no larger than what it says.
    """
    most = min(GPU_PREFILL_CHUNK if on_gpu() else PREFILL_CHUNK, model.plan.chunk if model.plan else 1 << 30)
    begin = 0
    while begin < len(ids):
        if cancelled():
            return
        chunk = ids[begin : begin + (min(most, timed.size) if timed else most)]
        read = len(chunk)
        if timed:
            timed.begin()
        before = cache.hidden
        tokens = mixed(begin, begin + read) if mixed else None
        hidden = model.hidden(chunk, cache) if tokens is None else model.hidden_with_images(tokens, cache)
        if tokens is not None:  # the draft head reads the text after the last picture
            text = int(tokens.places[-1]) + 1
            before, chunk, hidden = hidden[:, text - 1 : text], chunk[text:], hidden[:, text:]
        if drafts and begin + read == len(ids) and chunk:
            prefill_draft_head(model, cache, list(chunk), before, hidden)
        mx.eval(cache.arrays())
        mx.clear_cache()
        if timed:
            timed.end(read)
        begin += read
        yield begin


class Decoder:
    """Draws one id after another; the device already computes the next step when `next` returns.

    The cache has then read the returned id, so cache and ids agree wherever a reply ends.
    """

    def __init__(self, model: Model, cache: Cache, settings: Sampling, constraint: Constraint | None = None):
        """Decode after the prompt that `cache` has read, within a `constraint`.

        Raises ValueError for an empty cache.
        """
        if cache.hidden is None:
            raise ValueError("cannot decode from an empty cache: prefill a prompt first")
        self._model, self._cache, self._constraint = model, cache, constraint
        self.figures = DraftFigures()
        self._sample = make_sampler(settings)
        self._state = initial_state(settings, model.config.vocab_size)
        self._draw(cache.hidden)

    def next(self) -> int:
        """Return the next id, and start computing the one after it."""
        token = self._token
        self._draw(self._model.hidden(token[None], self._cache), token)
        return int(token)

    def force(self, token: int) -> None:
        """Make `token` the next id, in place of the one drawn."""
        self._token = mx.array(token, mx.uint32)
        self._state = count_token(self._state_before, token)

    @property
    def logits(self) -> mx.array:
        """The logits [V] of the next id."""
        return self._logits

    def rank(self, token: int) -> int:
        """Return how many ids have a higher logit than `token` at the next position."""
        return int((self._logits > self._logits[token]).sum())

    def finish(self) -> None:
        """Do nothing: the cache never reads more than the returned ids."""

    def _draw(self, hidden: mx.array, after: mx.array | None = None) -> None:
        """Start the draw of the next id, which follows `after`."""
        self._logits = logits = self._model.logits(hidden)[-1]
        if self._constraint:
            mx.async_eval(logits)  # the device computes while the host looks which ids may follow
            if after is not None:
                self._constraint.accept(int(after))
            logits = self._constraint.restrict(logits)
        self._state_before = self._state
        self._token, self._state = self._sample(logits, self._state)
        mx.async_eval(self._token)


AnyDecoder = Decoder | SpeculativeDecoder


def draft_limit(model: Model, requested: int | None) -> int:
    """Return the most drafts of a step: `requested`, or for None as many as pay, if QCHAT_DRAFTING is `auto`.

    Returns 0 for a model shared by ranks, where a step with drafts would cost as much as they save. Raises
    UsageError for an unknown QCHAT_DRAFTING.
    """
    choice = os.environ.get("QCHAT_DRAFTING", "auto")
    if choice not in ("auto", "off"):
        raise UsageError(f"QCHAT_DRAFTING is {choice!r}, wanted auto, off")
    if model.shared or (requested is None and choice == "off"):
        return 0
    return MAX_DRAFTS if requested is None else min(requested, MAX_DRAFTS)


def make_decoder(
    model: Model,
    cache: Cache,
    settings: Sampling,
    drafts: int,
    memory: DraftMemory | None = None,
    *,
    constraint: Constraint | None = None,
) -> AnyDecoder:
    """Return a decoder with at most `drafts` drafts a step; 0 turns speculative decoding off.

    Within a `constraint` it is off too, because each draft would need a mask of its own.
    `memory` is that of the conversation whose prompt the cache has read. Raises WeightsError if what the
    prompt left is not finite.
    """
    if cache.hidden is not None:
        model.check_finite(cache.hidden)
    if constraint or not drafts:
        return Decoder(model, cache, settings, constraint)
    return SpeculativeDecoder(model, cache, settings, drafts, memory)
