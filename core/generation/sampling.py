"""From logits to a token id: `Sampling` settings, where each comes from, and pure lazy functions.

Order: penalties, temperature, top-k, top-p, min-p, draw. Penalties count generated ids only, all of them.
Among equal logits the lower id comes first. Nothing here waits for the device: decode runs one step ahead.
"""

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from ..errors import ConfigError, UsageError
from ..machine.backend import mx

MAX_SEED = (1 << 63) - 1


class _Range(NamedTuple):
    low: float
    high: float
    whole: bool = False

    def holds(self, value: object) -> bool:
        kinds = int if self.whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        low, high = (f"{bound:,}" if self.whole else f"{bound:g}" for bound in (self.low, self.high))
        return f"a {'whole ' if self.whole else ''}number from {low} to {high}"


# the bounds of penalties only keep out values that no logit survives
_RANGES = {
    "temperature": _Range(0, 100),
    "top_k": _Range(0, 1 << 22, whole=True),
    "top_p": _Range(0, 1),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0.01, 100),
    "presence_penalty": _Range(-100, 100),
    "frequency_penalty": _Range(-100, 100),
    "seed": _Range(0, MAX_SEED, whole=True),
}


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen; as constructed, plain draws from the model's own distribution.

    temperature 0 or top_p 0 takes the most likely id; top_k 0, top_p 1 and min_p 0 cut nothing off;
    a repetition penalty divides (multiplies, when negative) the logit of an id that was generated before,
    presence subtracts once, frequency once for each time; equal seeds give equal ids, None draws a new seed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_p == 0

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def validate(self) -> "Sampling":
        """Itself. Raises UsageError that names the setting, its value and its range."""
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if not (allowed.holds(value) or (name == "seed" and value is None)):
                raise UsageError(f"{name} is {value!r}, wanted {allowed}")
        return self


THINKING = Sampling(temperature=1.0, top_p=0.95, top_k=20)
ANSWERING = Sampling(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)


def resolve(request: Mapping[str, Any], generation_config: Mapping[str, Any], thinking: bool) -> Sampling:
    """Each setting from the request, else the model's generation_config.json, else the preset.

    None means not given; other keys are left to whoever owns them. A preset's penalty belongs to its
    temperature, so a greedy request gets none that it did not ask for.
    Raises UsageError for a value in the request, ConfigError for one in the file.
    """
    given = _from_file(generation_config) | _given(request)
    preset = THINKING if thinking else ANSWERING
    if 0 in (given.get("temperature"), given.get("top_p")):
        preset = Sampling()
    return replace(preset, **given).validate()


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in fields(Sampling) if values.get(f.name) is not None}


def _from_file(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    given = _given(generation_config)
    given.pop("seed", None)  # a downloaded file does not take chance away
    if generation_config.get("do_sample") is False:
        given["temperature"] = 0
    try:
        Sampling(**given).validate()
    except UsageError as error:
        raise ConfigError(f"generation_config.json: {error}") from error
    return given


class State(NamedTuple):
    """What one reply carries from id to id."""

    key: mx.array  # the next random key
    counts: mx.array | None  # [V] int32, how often each id was generated; none when nothing is penalized


Sampler = Callable[[mx.array, State], tuple[mx.array, State]]


def start(settings: Sampling, vocab_size: int) -> State:
    """The state before the first id of a reply."""
    seed = secrets.randbits(63) if settings.seed is None else settings.seed
    return State(mx.random.key(seed), mx.zeros([vocab_size], mx.int32) if settings.penalizes else None)


def count(state: State, token: mx.array | int) -> State:
    """`state` after `token` (an array [] or an id) was generated; for ids that were forced, not drawn."""
    if state.counts is None:
        return state
    return state._replace(counts=state.counts.at[token].add(1))


def sampler(settings: Sampling) -> Sampler:
    """A function from logits ([V], any float dtype) and a state to a token id ([] uint32) and the next state.

    It is pure: an unwanted draw is undone by keeping the state from before it.
    """

    def sample(logits: mx.array, state: State) -> tuple[mx.array, State]:
        logits = penalize(logits.astype(mx.float32), state.counts, settings)
        if settings.greedy:
            token = mx.argmax(logits)
        else:
            key, this = mx.random.split(state.key)
            token = draw(*candidates(logits, settings), this)
            state = state._replace(key=key)
        return token, count(state, token)

    return sample


def penalize(logits: mx.array, counts: mx.array | None, settings: Sampling) -> mx.array:
    """Logits [V] less the penalties for ids in `counts` [V]: repetition, then presence, then frequency."""
    if counts is None:
        return logits
    seen = counts > 0
    if settings.repetition_penalty != 1:
        factor = settings.repetition_penalty
        logits = mx.where(seen, mx.where(logits > 0, logits / factor, logits * factor), logits)
    if settings.presence_penalty != 0:
        logits = logits - settings.presence_penalty * seen
    if settings.frequency_penalty != 0:
        logits = logits - settings.frequency_penalty * counts
    return logits


def ranked(logits: mx.array, k: int = 0) -> tuple[mx.array, mx.array]:
    """The `k` highest of logits [V], all for 0: values [k] from high to low and their ids [k] uint32.

    Sorts the members of `k` chunks only: an id outside the chunks with the k highest maxima has the k maxima
    ahead of it. Exact, ties included: argsort is stable and ids stay in ascending order until the end.
    """
    size = logits.shape[0]
    chunk = _chunk_length(size, k) if 0 < k < size else 1
    if chunk > 1:
        logits, ids = _winning_chunks(logits, k, chunk)
    else:
        ids = mx.arange(size, dtype=mx.uint32)
    order = mx.argsort(-logits)[: k or size]
    return logits[order], ids[order]


def _chunk_length(size: int, k: int) -> int:
    """The power of two that about equals the number of chunk maxima and of members of winning chunks."""
    return 1 << round(math.log2(size / k) / 2)


def _winning_chunks(logits: mx.array, k: int, chunk: int) -> tuple[mx.array, mx.array]:
    """Members of the `k` chunks with the highest maxima and their ids, both [k * chunk], ids ascending.

    The last chunk is filled up with -inf, which ranks behind every id that is one.
    """
    padding = -logits.shape[0] % chunk
    if padding:
        logits = mx.pad(logits, (0, padding), constant_values=-math.inf)
    rows = logits.reshape(-1, chunk)  # [ceil(V / chunk), chunk]
    winners = mx.sort(mx.argsort(-rows.max(axis=-1))[:k])
    ids = winners[:, None] * chunk + mx.arange(chunk, dtype=mx.uint32)
    return rows[winners].flatten(), ids.flatten()


def keep_top_p(probs: mx.array, top_p: float) -> mx.array:
    """Which of `probs`, high to low and summing to 1, make the smallest set whose sum reaches `top_p`."""
    return mx.cumsum(probs, inclusive=False) < top_p


def keep_min_p(probs: mx.array, min_p: float) -> mx.array:
    """Which of `probs` are at least `min_p` times the highest."""
    return probs >= min_p * probs.max()


def candidates(logits: mx.array, settings: Sampling) -> tuple[mx.array, mx.array | None]:
    """Log weights [n], -inf for what top-p and min-p cut off, and their ids [n]; no ids when all V are kept.

    Temperature after the top-k is temperature before it: dividing does not change who ranks higher.
    """
    ids = None
    if settings.top_k > 0 or settings.top_p < 1:
        logits, ids = ranked(logits, settings.top_k)
    # the highest becomes 0, so that no temperature overflows
    scores = (logits - logits.max()) / settings.temperature
    probs = mx.softmax(scores)
    if settings.top_p < 1:
        scores = mx.where(keep_top_p(probs, settings.top_p), scores, -math.inf)
    if settings.min_p > 0:
        scores = mx.where(keep_min_p(probs, settings.min_p), scores, -math.inf)
    return scores, ids


def draw(scores: mx.array, ids: mx.array | None, key: mx.array) -> mx.array:
    """One of `ids` ([n], or 0 to n - 1) with probabilities softmax(`scores` [n])."""
    place = mx.random.categorical(scores, key=key)
    return place if ids is None else ids[place]
