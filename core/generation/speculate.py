"""Speculative decoding: the MTP head drafts the next ids, and the model verifies all drafts in one step.

A draft is accepted where the model draws the same id at its position. So the ids have exactly the
distribution of plain decoding, and for equal seeds are the same (Leviathan et al., arXiv 2211.17192, with a
deterministic draft). The number of drafts adapts to the acceptance rates.
"""

from itertools import takewhile
from typing import cast

from ..machine.backend import mx
from ..model.cache import Cache, KVCache
from ..model.network import Model
from .sampling import Sampling, count_token, initial_state, make_sampler

MAX_DRAFTS = 3
INITIAL_RATE = 0.8
# a draft is worth verifying from this chance of acceptance on: about what it adds to a step's time
MIN_CHANCE = 0.35
# weight of the newest outcome in an acceptance rate
LEARNING_RATE = 0.1
# every so many steps one draft is tried although its chance is too small
RETRY_STEPS = 32
# last tokens of the prompt that the draft head reads: more take time and do not improve its drafts
WINDOW = 128


def prefill_draft_head(
    model: Model, cache: Cache, ids: list[int], before: mx.array | None, hidden: mx.array
) -> None:
    """Have the draft head read `ids`, the last that the cache has read; at most WINDOW of them.

    `before` is the hidden state [1, 1, hidden] before the first id, `hidden` [1, T, hidden] those after each.
    Where the draft head has missed earlier ids, its cache starts over.
    """
    if model.mtp is None:
        return
    begin = max(0, len(ids) - WINDOW)
    first = cache.length - len(ids)
    if begin or cache.draft_end != first:
        cache.draft = KVCache()
    if begin:
        states = hidden[:, begin - 1 : -1]
    elif before is not None:
        states = mx.concatenate([before, hidden[:, :-1]], axis=1)
    else:
        begin, states = 1, hidden[:, :-1]
    if states.shape[1]:
        model.mtp_hidden(mx.array(ids[begin:]), states, cache.draft)
    cache.draft_end = cache.length


class AcceptanceRates:
    """Moving averages of how often the draft at each position is accepted."""

    def __init__(self):
        self.rates = [INITIAL_RATE] * MAX_DRAFTS
        self.steps = 0

    def draft_count(self, limit: int) -> int:
        """Return how many drafts the next step should verify, at most `limit`."""
        self.steps += 1
        chance, number = 1.0, 0
        for rate in self.rates[:limit]:
            chance *= rate
            if chance < MIN_CHANCE:
                break
            number += 1
        return max(number, int(self.steps % RETRY_STEPS == 0 and limit > 0))

    def update(self, drafted: int, accepted: int) -> None:
        """Learn from a step that accepted the first `accepted` of `drafted` drafts."""
        for position in range(min(drafted, accepted + 1)):
            self.rates[position] += LEARNING_RATE * ((position < accepted) - self.rates[position])


class SpeculativeDecoder:
    """Draws the same ids as `decode.Decoder`, several a step where drafts are accepted.

    After `finish` the cache has read exactly the prompt and the ids that `next` returned.
    """

    def __init__(self, model: Model, cache: Cache, settings: Sampling, max_drafts: int = MAX_DRAFTS):
        """Decode after the prompt that `cache` has read, with a `model` that has a draft head.

        Raises ValueError for an empty cache.
        """
        if cache.hidden is None:
            raise ValueError("cannot decode from an empty cache: prefill a prompt first")
        self._model, self._cache, self._max_drafts = model, cache, min(max_drafts, MAX_DRAFTS)
        self._sample = make_sampler(settings)
        self._rates = AcceptanceRates()
        self.drafted = self.accepted = 0
        # the last step: its accepted ids, how many of them were returned, and how many ids the model read
        self._ids: list[int] = []
        self._returned = self._read = 0
        # hidden states and logits after each id read
        self._hidden = cache.hidden
        self._logits = model.logits(cache.hidden)
        # the id drawn after each of them, and the sampler's states before and after each draw
        state = initial_state(settings, model.config.vocab_size)
        token, after = self._sample(self._logits[-1], state)
        self._drawn, self._states = [int(token)], [state, after]

    def next(self) -> int:
        """Return the next id."""
        if self._returned == len(self._ids):
            self._step()
        self._returned += 1
        return self._ids[self._returned - 1]

    def force(self, token: int) -> None:
        """Make `token` the next id, in place of the one drawn."""
        position = self._position
        self._ids = self._ids[: self._returned]
        self._drawn[position] = token
        self._states[position + 1] = count_token(self._states[position], token)

    def rank(self, token: int) -> int:
        """Return how many ids have a higher logit than `token` at the next position."""
        logits = self._logits[self._position]
        return int((logits > logits[token]).sum())

    def finish(self) -> None:
        """Commit the returned ids to the cache and roll back the rest of the step."""
        if self._read:
            self._cache.commit(self._returned, self._read)
            self._cache.hidden = self._hidden[:, self._returned - 1 : self._returned]
            self._read = 0

    @property
    def _position(self) -> int:
        """The position of the last returned id within the last step; 0 before the first."""
        return max(self._returned - 1, 0)

    def _step(self) -> None:
        """Read the drawn id and drafts after it; accept the drafts that the model draws too."""
        self.finish()
        position = self._position
        first, state = self._drawn[position], self._states[position + 1]
        drafts = self._draft(first, self._rates.draft_count(self._max_drafts))
        ids = mx.concatenate([mx.array([first], mx.uint32), *drafts])
        self._hidden = self._model.forward_speculative(ids, self._cache)
        self._logits = self._model.logits(self._hidden)
        drawn, self._states = [], [state]
        for logits in self._logits:
            token, state = self._sample(logits, state)
            drawn.append(token)
            self._states.append(state)
        both = cast(list[int], mx.concatenate([ids, mx.stack(drawn).astype(mx.uint32)]).tolist())
        read, self._drawn = both[: ids.size], both[ids.size :]
        pairs = zip(read[1:], self._drawn, strict=False)
        accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._ids, self._returned, self._read = read[: accepted + 1], 0, len(read)
        self._rates.update(len(drafts), accepted)
        self.drafted += len(drafts)
        self.accepted += accepted

    def _draft(self, token: int, number: int) -> list[mx.array]:
        """Return `number` drafts [1] of the ids after `token`; the draft head's cache keeps none of them."""
        cache, model = self._cache, self._model
        new = mx.array([*self._ids[1 : self._returned], token], mx.uint32)
        if cache.draft_end != cache.length - new.size + 1:
            cache.draft = KVCache()
        states = model.mtp_hidden(new, self._hidden[:, : new.size], cache.draft)
        cache.draft_end = cache.length + 1
        drafts: list[mx.array] = []
        for position in range(number):
            state = states[:, -1:]
            if position:
                states = model.mtp_hidden(drafts[-1], state, cache.draft)
                state = states
            drafts.append(mx.argmax(model.logits(state), axis=-1).astype(mx.uint32))
        cache.draft.trim(max(number - 1, 0))
        return drafts
