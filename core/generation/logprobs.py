"""Log probabilities of a drawn id and of the likeliest ones, by the model's own distribution.

Temperature, penalties and the cuts of sampling change what is drawn, not what is reported.
"""

from typing import NamedTuple

from ..events import LEAST_LOGPROB
from ..machine.backend import mx
from .decode import AnyDecoder
from .sampling import sort_top_k


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
    logits = decoder.logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    values, ids = sort_top_k(logprobs, count) if count else (logprobs[:0], mx.array([], mx.uint32))
    mx.async_eval(logprobs, values, ids)
    return Ranking(logprobs, values, ids)
