"""Decoding with drafts: the MTP head guesses the next ids, the model reads all guesses in one step.

A guess stands where the model, reading it, draws the same id for its place, so that what comes out has
exactly the distribution (and for one seed the ids) of decoding without drafts (Leviathan et al., arXiv
2211.17192, with a draft that is certain of itself). How many are worth guessing is learned as it goes.
"""

from itertools import takewhile
from typing import cast

from ..machine.backend import mx
from ..model.cache import Cache, KVCache
from ..model.network import Model
from .sampling import Sampling, count, sampler, start

MOST_DRAFTS = 3
# a draft is tried where it stands at least so often: about what reading it adds to a step's time
WORTH = 0.35
# each try moves the estimate by this much; every so many steps a hopeless draft is tried again
LEARNING, RETRY = 0.1, 32
# tokens of the prompt that the draft head reads: more cost time and made its guesses no better
WINDOW = 128


def read_ahead(model: Model, cache: Cache, ids: list[int], before: mx.array | None, hidden: mx.array) -> None:
    """Let the draft head read `ids`, the last that the cache has read.

    `before` is the hidden state [1, 1, hidden] before the first of them, `hidden` [1, T, hidden] those after
    each. Only the last WINDOW are read; earlier ones that are missing are forgotten altogether.
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


class Acceptance:
    """How often the draft at each place stood, lately."""

    def __init__(self):
        self.rates = [0.8] * MOST_DRAFTS
        self.steps = 0

    def drafts(self, most: int) -> int:
        """How many drafts the next step should read."""
        self.steps += 1
        chance, places = 1.0, 0
        for rate in self.rates[:most]:
            chance *= rate
            if chance < WORTH:
                break
            places += 1
        return max(places, int(self.steps % RETRY == 0 and most > 0))

    def learn(self, tried: int, stood: int) -> None:
        for place in range(min(tried, stood + 1)):
            self.rates[place] += LEARNING * ((place < stood) - self.rates[place])


class DraftingDecoder:
    """Draws ids like `generate.Decoder`, several a step where drafts stand.

    After `finish` the cache has read exactly the prompt and the ids that `next` returned.
    """

    def __init__(self, model: Model, cache: Cache, settings: Sampling, most: int = MOST_DRAFTS):
        """`cache` has read the whole prompt, one id at least; `model` has a draft head."""
        if cache.hidden is None:
            raise ValueError("a cache that has read nothing predicts nothing")
        self._model, self._cache, self._most = model, cache, min(most, MOST_DRAFTS)
        self._sample = sampler(settings)
        self._acceptance = Acceptance()
        self.drafted = self.accepted = 0
        # of the last step: its ids that stand, how many were handed out, hidden states and logits after each
        self._ids: list[int] = []
        self._given = self._read = 0
        self._hidden = cache.hidden
        self._logits = model.logits(cache.hidden)
        # the id drawn after each place, and the sampler's states before and after drawing it
        state = start(settings, model.config.vocab_size)
        token, after = self._sample(self._logits[-1], state)
        self._drawn, self._states = [int(token)], [state, after]

    def next(self) -> int:
        """The next id."""
        if self._given == len(self._ids):
            self._step()
        self._given += 1
        return self._ids[self._given - 1]

    def force(self, token: int) -> None:
        """Let `token` be the next id, whatever was drawn."""
        place = self._place
        self._ids = self._ids[: self._given]
        self._drawn[place] = token
        self._states[place + 1] = count(self._states[place], token)

    def rank(self, token: int) -> int:
        """How many ids are likelier than `token` to come next."""
        logits = self._logits[self._place]
        return int((logits > logits[token]).sum())

    def finish(self) -> None:
        """Let the cache have read what was handed out and no more."""
        if self._read:
            self._cache.commit(self._given, self._read)
            self._cache.hidden = self._hidden[:, self._given - 1 : self._given]
            self._read = 0

    @property
    def _place(self) -> int:
        """Of the id handed out last, among the last step's; 0 also before any."""
        return max(self._given - 1, 0)

    def _step(self) -> None:
        """Read the drawn id and drafts after it; keep those drafts that are drawn in their place."""
        self.finish()
        place = self._place
        first, state = self._drawn[place], self._states[place + 1]
        drafts = self._draft(first, self._acceptance.drafts(self._most))
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
        stood = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(read[1:], self._drawn, strict=False))
        )
        self._ids, self._given, self._read = read[: stood + 1], 0, len(read)
        self._acceptance.learn(len(drafts), stood)
        self.drafted += len(drafts)
        self.accepted += stood

    def _draft(self, token: int, number: int) -> list[mx.array]:
        """The draft head's guesses [1] for the ids after `token`, each read into its own cache."""
        cache, model = self._cache, self._model
        known = mx.array([*self._ids[1 : self._given], token], mx.uint32)
        if cache.draft_end != cache.length - known.size + 1:
            cache.draft = KVCache()
        states = model.mtp_hidden(known, self._hidden[:, : known.size], cache.draft)
        cache.draft_end = cache.length + 1
        drafts: list[mx.array] = []
        for place in range(number):
            state = states[:, -1:]
            if place:
                states = model.mtp_hidden(drafts[-1], state, cache.draft)
                state = states
            drafts.append(mx.argmax(model.logits(state), axis=-1).astype(mx.uint32))
        cache.draft.trim(max(number - 1, 0))
        return drafts
