"""Speculative decoding: drafts of the next ids, all verified by the model in one step.

Drafts are copied from the context where its last ids occurred before, or come from the MTP head, whichever
promises more; `draft_gate` decides how many, `verification` which are accepted. Steps without drafts run one
ahead of the id returned, as those of `decode.Decoder` do.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import cast

from ..machine.backend import mx
from ..model.cache import Cache
from ..model.network import Model
from .copy_drafts import CopyDrafts
from .draft_gate import MAX_DRAFTS, NO_DRAFTS, Choice, DraftGate, Source
from .draft_head import DraftHead
from .sampling import SamplerState, Sampling, count_token, initial_state
from .verification import Draft, make_verifier

# from so many ids on a match is a long one: drafts after it are accepted more often
LONG_MATCH = 8


@dataclass
class DraftMemory:
    """What drafts need of a conversation: its ids, and what was learned in its replies."""

    copies: CopyDrafts = field(default_factory=CopyDrafts)
    gate: DraftGate = field(default_factory=DraftGate)
    step_rows: int = 0  # of the model when the gate began to learn

    def prepare(self, model: Model) -> None:
        """Begin to learn anew where the model's steps are computed in another way than before."""
        if self.step_rows and self.step_rows != model.step_rows:
            self.gate = DraftGate()
        self.step_rows = model.step_rows


@dataclass
class DraftFigures:
    """How drafts did in one reply: how many were tried and accepted, by place, and what their steps took."""

    tried: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    steps: int = 0  # with drafts
    seconds: float = 0.0  # which those took
    plain_steps: int = 0
    plain_seconds: float = 0.0  # of one step without drafts; 0 before any was measured

    def add(self, drafted: int, accepted: int, seconds: float) -> None:
        """Count a step that accepted the first `accepted` of its drafts."""
        for place in range(drafted):
            self.tried[place] += 1
            self.accepted[place] += place < accepted
        self.steps += 1
        self.seconds += seconds

    @property
    def share(self) -> float | None:
        """The share of drafts that were accepted; None where none were tried."""
        return sum(self.accepted) / sum(self.tried) if self.steps else None

    @property
    def by_place(self) -> tuple[float, ...]:
        """The same for each place at which a draft was tried."""
        return tuple(a / n for a, n in zip(self.accepted, self.tried, strict=True) if n)

    @property
    def cost(self) -> float | None:
        """The mean time of a step with drafts, relative to one without; None where either is missing."""
        plain = self.steps * self.plain_seconds
        return self.seconds / plain if plain else None

    @property
    def gain(self) -> float | None:
        """The speed of the reply, relative to the speed without drafts."""
        if self.cost is None:
            return None
        ids = self.plain_steps + self.steps + sum(self.accepted)
        return ids / (self.plain_steps + self.steps * self.cost)


class SpeculativeDecoder:
    """Draws ids as `decode.Decoder` does, several a step where drafts are accepted.

    After `finish` the cache has read exactly the prompt and the ids that `next` returned.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        settings: Sampling,
        limit: int = MAX_DRAFTS,
        memory: DraftMemory | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Decode after the prompt that `cache` has read, with at most `limit` drafts a step.

        Drafts are copied from the ids of `memory`, which are those of the prompt. Raises ValueError for an
        empty cache.
        """
        if cache.hidden is None:
            raise ValueError("cannot decode from an empty cache: prefill a prompt first")
        self._model, self._cache, self._limit, self._clock = model, cache, limit, clock
        self.memory = memory or DraftMemory()
        self.memory.prepare(model)
        self._copies, self._gate = self.memory.copies, self.memory.gate
        self._head = DraftHead(model, cache) if model.mtp is not None else None
        self._verifier = make_verifier(settings)
        self.figures = DraftFigures()
        # the last step: its accepted ids, how many of them were returned, and how many ids may be rolled back
        self._ids: list[int] = []
        self._returned = self._read = 0
        self._is_ahead = False  # whether the device computed while the last id was waited for
        # hidden states and logits after each id read
        self._hidden = cache.hidden
        self._logits = model.logits(cache.hidden)
        # the id drawn after each of them, and the sampler's states before and after each draw
        state = initial_state(settings, model.config.vocab_size)
        drawn, states = self._verifier.verify(self._logits, state)
        self._drawn: Sequence[int | mx.array] = [drawn[0]]
        self._states = [state, *states]

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
        self._drawn = [*self._drawn[:position], token]
        self._states[position + 1] = count_token(self._states[position], token)

    @property
    def logits(self) -> mx.array:
        """The logits [V] of the next id."""
        return self._logits[self._position]

    def rank(self, token: int) -> int:
        """Return how many ids have a higher logit than `token` at the next position."""
        logits = self.logits
        return int((logits > logits[token]).sum())

    def finish(self) -> None:
        """Commit the returned ids to the cache and roll back the rest of the step."""
        if self._read:
            self._commit()
            self._cache.detach()

    def _commit(self) -> None:
        if self._read:
            self._cache.commit(self._returned, self._read)
            self._cache.hidden = self._hidden[:, self._returned - 1 : self._returned]
            self._read = 0

    @property
    def _most_drafts(self) -> int:
        return min(self._limit, self._model.step_rows - 1)

    @property
    def _position(self) -> int:
        """The position of the last returned id within the last step; 0 before the first."""
        return max(self._returned - 1, 0)

    def _step(self) -> None:
        """Read the drawn id, with drafts after it where they pay."""
        self._commit()
        position = self._position
        first, state = self._drawn[position], self._states[position + 1]
        self._copies.extend(self._ids[1 : self._returned])
        if isinstance(first, mx.array) and self._choose_copies()[1].drafts:
            first = int(first)  # the match may go on after it
        if isinstance(first, int):
            self._copies.add(first)
        if self._head:
            new = mx.array(self._ids[1 : self._returned], mx.uint32)
            self._head.note(mx.concatenate([new, _row(first)]), self._hidden[:, : position + 1])
        source, choice = self._choose(matches=isinstance(first, int))
        if choice.drafts:
            self._step_with_drafts(int(first), state, source, choice)
        else:
            self._step_without_drafts(first, state)

    def _choose(self, *, matches: bool) -> tuple[Source, Choice]:
        """Return whose drafts to verify, and how many; `matches` means that the copies know all ids.

        Trying copies comes first: a match may be rare, and the draft head can always be tried.
        """
        source, copies = self._choose_copies() if matches else ("long copy", NO_DRAFTS)
        head = self._gate.choose("head", self._most_drafts) if self._head else NO_DRAFTS
        if copies.drafts and (copies.rival or not head.drafts or copies.speed >= head.speed):
            return source, copies
        return "head", head

    def _choose_copies(self) -> tuple[Source, Choice]:
        matched = self._copies.matched
        source: Source = "long copy" if matched >= LONG_MATCH else "short copy"
        return source, self._gate.choose(source, self._most_drafts) if matched else NO_DRAFTS

    def _step_without_drafts(self, first: int | mx.array, state: SamplerState) -> None:
        """Read the drawn id, and start the draw after it before waiting for it."""
        begin, waits = self._clock(), isinstance(first, mx.array)
        self._hidden = self._model.hidden(_row(first), self._cache)
        self._logits = self._model.logits(self._hidden)
        drawn, states = self._verifier.verify(self._logits, state)
        token = drawn[0]
        # the id itself is evaluated: a slice taken later would wait for the step that reads it
        mx.async_eval(token)
        self._drawn, self._states = [token], [state, *states]
        self._ids, self._returned = [int(first)], 0
        if waits:
            self._copies.add(self._ids[0])
        self._gate.learn_plain(self._clock() - begin if waits and self._is_ahead else None)
        self.figures.plain_steps += 1
        self.figures.plain_seconds = self._gate.plain_seconds
        self._is_ahead = True

    def _step_with_drafts(self, first: int, state: SamplerState, source: Source, choice: Choice) -> None:
        """Read the drawn id and drafts after it; keep the drafts that are accepted."""
        begin = self._clock()
        drafts = self._draft(source, choice.drafts, state)
        ids = mx.concatenate([_row(first), *(_row(draft.token) for draft in drafts)])
        self._hidden = self._model.forward_speculative(ids, self._cache)
        self._logits = self._model.logits(self._hidden)
        drawn, states = self._verifier.verify(self._logits, state, drafts)
        both = cast(list[int], mx.concatenate([ids, drawn]).tolist())
        read, found = both[: ids.size], both[ids.size :]
        accepted = self._count_accepted(read[1:], found)
        self._drawn, self._states = found, [state, *states]
        self._ids, self._returned, self._read = read[: accepted + 1], 0, len(read)
        seconds = self._clock() - begin
        self._gate.learn(source, choice, accepted, seconds)
        self.figures.add(choice.drafts, accepted, seconds)
        self.figures.plain_seconds = self._gate.plain_seconds
        self._is_ahead = False

    def _draft(self, source: Source, count: int, state: SamplerState) -> list[Draft]:
        if source == "head" and self._head:
            return self._head.draft(count, self._verifier, state)
        return [Draft(mx.array(id, mx.uint32)) for id in self._copies.proposal(count)]

    def _count_accepted(self, drafts: list[int], drawn: list[int]) -> int:
        """Return how many of the drafts are followed by all that the model would have drawn."""
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(drafts, drawn, strict=False)))


def _row(id: int | mx.array) -> mx.array:
    """Return an id as an array [1]."""
    return (mx.array(id) if isinstance(id, int) else id).astype(mx.uint32).reshape(1)
