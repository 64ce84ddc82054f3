"""Log probabilities of a drawn id and of the likeliest ones, by the model's own distribution.

Temperature, penalties and the cuts of sampling change what is drawn, not what is reported.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..events import LEAST_LOGPROB, Logprobs, TokenProbability
from ..machine.backend import mx
from ..model.cache import Cache
from ..model.network import Model
from ..text.tokenizer import Tokenizer
from .decode import AnyDecoder
from .sampling import sort_top_k

SCORED_ROWS = 32  # ids whose logits are in memory at once


class Ranking(NamedTuple):
    """A distribution: log probabilities [V] float32, the likeliest of them [k], and the ids of those [k]."""

    logprobs: mx.array
    values: mx.array
    ids: mx.array

    def logprob(self, token: int) -> float:
        """Return the log probability of `token`."""
        return max(float(self.logprobs[token]), LEAST_LOGPROB)

    def top(self) -> list[tuple[int, float]]:
        """Return the likeliest ids with their log probabilities, from high to low."""
        values = (max(float(value), LEAST_LOGPROB) for value in self.values)
        return list(zip(map(int, self.ids), values, strict=True))


def rank_next(decoder: AnyDecoder, count: int) -> Ranking:
    """Begin to compute the distribution of the decoder's next id, with its `count` likeliest ids.

    Waits for nothing: call it before `decoder.next` queues another step, and read it afterwards.
    """
    ranking = _rank(decoder.logits, count)
    mx.async_eval(*ranking)
    return ranking


def rank_each(model: Model, cache: Cache, ids: Sequence[int], count: int) -> Iterator[list[Ranking]]:
    """Read `ids` into the cache; yields the distributions that they were drawn from, some ids at a time.

    The cache has read what comes before them.
    """
    for begin in range(0, len(ids), SCORED_ROWS):
        piece, before = ids[begin : begin + SCORED_ROWS], cache.hidden
        if before is None:
            raise ValueError("cannot score after an empty cache: prefill a prompt first")
        hidden = mx.concatenate([before, model.hidden(piece, cache)[:, :-1]], axis=1)  # [1, T, hidden]
        logits = model.logits(hidden)  # [T, V]
        rankings = [_rank(logits[row], count) for row in range(len(piece))]
        mx.eval(*(array for one in rankings for array in one), *cache.arrays())
        yield rankings


def _rank(logits: mx.array, count: int) -> Ranking:
    """Return the distribution of logits [V], which is not computed yet."""
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    values, ids = sort_top_k(logprobs, count) if count else (logprobs[:0], mx.array([], mx.uint32))
    return Ranking(logprobs, values, ids)


def describe_draw(tokenizer: Tokenizer, token: int, ranking: Ranking, *, in_thought: bool) -> Logprobs:
    """Return the event that tells how likely `token` was, and what else could have come."""

    def probability(id: int, logprob: float) -> TokenProbability:
        return TokenProbability(id, tuple(tokenizer.token_bytes(id)), logprob)

    top = tuple(probability(*one) for one in ranking.top())
    return Logprobs(probability(token, ranking.logprob(token)), top, in_thought)
