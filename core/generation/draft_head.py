"""Drafts by the MTP head: from the hidden state before an id and the id, the one after it."""

from ..machine.backend import mx
from ..model.cache import Cache, KVCache
from ..model.network import Model
from .sampling import SamplerState
from .verification import Draft, Verifier

# last tokens of a prompt that the draft head reads: more take time and do not improve its drafts
WINDOW = 128
# ids of steps without drafts that it reads before it drafts again; after more it starts over with the last
CATCH_UP = 8


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


class DraftHead:
    """The draft head along one reply; it reads the ids of steps without drafts when it drafts next."""

    def __init__(self, model: Model, cache: Cache):
        self._model, self._cache = model, cache
        self._ids: list[mx.array] = []
        self._hidden: list[mx.array] = []

    def note(self, ids: mx.array, hidden: mx.array) -> None:
        """Take ids [T], drawn since the last call, and the hidden states [1, T, hidden] before each."""
        self._ids.append(ids)
        self._hidden.append(hidden)
        if len(self._ids) > CATCH_UP:
            del self._ids[0], self._hidden[0]

    def draft(self, number: int, verifier: Verifier, state: SamplerState) -> list[Draft]:
        """Return `number` drafts of the ids after the noted ones; the head's cache keeps none of them.

        `state` is the sampler's after the noted ids, of which the cache has not read the last one yet.
        """
        model, cache = self._model, self._cache
        ids, hidden = mx.concatenate(self._ids), mx.concatenate(self._hidden, axis=1)
        self._ids, self._hidden = [], []
        if cache.draft_end != cache.length - ids.size + 1:
            cache.draft = KVCache()
        hidden = model.mtp_hidden(ids, hidden, cache.draft)[:, -1:]
        cache.draft_end = cache.length + 1
        drafts: list[Draft] = []
        for place in range(number):
            if place:
                hidden = model.mtp_hidden(drafts[-1].token[None], hidden, cache.draft)
            draft, state = verifier.draft(model.logits(hidden)[-1], state)
            drafts.append(draft)
        cache.draft.trim(number - 1)
        return drafts
