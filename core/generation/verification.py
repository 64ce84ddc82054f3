"""How drafts are drawn from the draft head's distribution, and verified against the model's.

The ids always have exactly the distribution of plain decoding. Which rule verifies depends on the settings:

- Greedy: a draft is accepted where it is the likeliest id.
- With a seed: draft head and model draw with the same random numbers, and a draft is accepted where the model
  draws it too. So the ids are those of plain decoding, however many drafts are tried and when, which depends
  on the speed of the machine. At least (1 - d) / (1 + d) of the drafts are accepted, where d is the total
  variation distance of the two distributions (Daliri et al., arXiv 2408.07978).
- Without a seed: rejection sampling, which accepts 1 - d (Leviathan et al., arXiv 2211.17192).

A draft that was copied from the context was not drawn: the model draws an id, which is the draft with the
probability that rejection sampling accepts it with.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..machine.backend import mx
from .sampling import SamplerState, Sampling, count_token, make_sampler, probabilities


class Draft(NamedTuple):
    """A draft id [] and the distribution [V] that it was drawn from; None for the other rules, and copies."""

    token: mx.array
    probs: mx.array | None = None


class Verifier:
    """What all rules share. States are those of `sampling.Sampler`, before and after an id."""

    def __init__(self, settings: Sampling):
        self._settings, self._sample = settings, make_sampler(settings)

    def draft(self, logits: mx.array, state: SamplerState) -> tuple[Draft, SamplerState]:
        """Draw a draft from the draft head's logits [V]; return it and the state after it."""
        token, state = self._sample(logits, state)
        return Draft(token), state

    def verify(
        self, logits: mx.array, state: SamplerState, drafts: Sequence[Draft] = ()
    ) -> tuple[mx.array, list[SamplerState]]:
        """Return the ids [T] that follow by the model's logits [T, V], and the state after each.

        `drafts` were tried in the first places, which all but the last may be. An id equals its draft exactly
        where that is accepted; what follows one that does not is void.
        """
        ids: list[mx.array] = []
        states: list[SamplerState] = []
        for row, draft in zip(logits, [*drafts, *[None] * (len(logits) - len(drafts))], strict=True):
            id, state = self._draw(row, state, draft)
            ids.append(id)
            states.append(state)
        return mx.stack(ids).astype(mx.uint32), states

    def _draw(
        self, logits: mx.array, state: SamplerState, draft: Draft | None
    ) -> tuple[mx.array, SamplerState]:
        """Return the id [] that follows by logits [V], and the state after it."""
        del draft
        return self._sample(logits, state)


class Greedy(Verifier):
    """Accepts the drafts that are the likeliest ids, penalties aside: all places are looked at together."""

    def verify(
        self, logits: mx.array, state: SamplerState, drafts: Sequence[Draft] = ()
    ) -> tuple[mx.array, list[SamplerState]]:
        del drafts
        return mx.argmax(logits, axis=-1).astype(mx.uint32), [state] * len(logits)


class SameDraw(Verifier):
    """Accepts the drafts that the model draws too."""


class RejectionSampling(Verifier):
    """Accepts a draft x with min(1, p(x) / q(x)), and draws from max(p - q, 0) in place of a rejected one."""

    def draft(self, logits: mx.array, state: SamplerState) -> tuple[Draft, SamplerState]:
        key, of_draft, *_ = mx.random.split(state.key, 4)
        probs = probabilities(logits, state.counts, self._settings)
        token = mx.random.categorical(mx.log(probs), key=of_draft)
        return Draft(token, probs), count_token(state._replace(key=key), token)

    def _draw(
        self, logits: mx.array, state: SamplerState, draft: Draft | None
    ) -> tuple[mx.array, SamplerState]:
        if draft is None or draft.probs is None:
            return self._sample(logits, state)
        key, _, of_acceptance, of_rest = mx.random.split(state.key, 4)
        probs = probabilities(logits, state.counts, self._settings)
        rest = mx.maximum(probs - draft.probs, 0)
        rest = mx.where(rest.sum() > 0, rest, probs)  # nothing is left where the distributions are equal
        redrawn = mx.random.categorical(mx.log(rest), key=of_rest)
        accepted = mx.random.uniform(key=of_acceptance) * draft.probs[draft.token] < probs[draft.token]
        token = mx.where(accepted, draft.token, redrawn)
        return token, count_token(state._replace(key=key), token)


def make_verifier(settings: Sampling) -> Verifier:
    """Return the rule for these settings."""
    if settings.greedy and not settings.penalizes:
        return Greedy(settings)
    if settings.greedy or settings.seed is not None:
        return SameDraw(settings)
    return RejectionSampling(settings)
