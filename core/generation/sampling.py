"""Sampling: settings and their defaults, and pure lazy functions from logits to a token id.

Order: penalties, top-k, temperature, top-p, min-p, draw. Penalties count all generated ids and no others.
Among equal logits the lower id ranks first. Nothing here waits for the device: decode runs one step ahead.
"""

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from ..errors import ConfigError, UsageError
from ..machine.backend import mx

MAX_SEED = (1 << 63) - 1
# of so many ids one may be a candidate for a random number of its own to take less time than one for each id
FEW_IDS = 8


class _Range(NamedTuple):
    low: float
    high: float
    whole: bool = False

    def contains(self, value: object) -> bool:
        kinds = int if self.whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        low, high = (f"{bound:,}" if self.whole else f"{bound:g}" for bound in (self.low, self.high))
        return f"a {'whole ' if self.whole else ''}number from {low} to {high}"


# the bounds of penalties only exclude values that would make every logit overflow or vanish
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
    """Settings for choosing the next id; the defaults sample from the model's own distribution.

    temperature: 0 takes the likeliest id, as does top_p 0. top_k: 0 keeps all ids, as do top_p 1 and min_p 0.
    repetition_penalty: divides the logit of an id that was generated before, or multiplies a negative one.
    presence_penalty: subtracted once from such a logit. frequency_penalty: subtracted once for each time.
    seed: equal seeds give equal ids; None draws a new one.
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
        """Return itself. Raises UsageError with the setting, its value and its range."""
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if not (allowed.contains(value) or (name == "seed" and value is None)):
                raise UsageError(f"{name} is {value!r}, wanted {allowed}")
        return self


THINKING = Sampling(temperature=1.0, top_p=0.95, top_k=20)
ANSWERING = Sampling(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)


def resolve_sampling(
    request: Mapping[str, Any], generation_config: Mapping[str, Any], thinking: bool
) -> Sampling:
    """Take each setting from the request, else the model's generation_config.json, else the preset.

    None means not given; other keys are ignored. The presets are tuned for their temperature, so a greedy
    request uses none of their values.
    Raises UsageError for a value in the request, ConfigError for one in the file that is not overridden.
    """
    own = _given_values(request)
    Sampling(**own).validate()
    recommended = {name: v for name, v in _model_values(generation_config).items() if name not in own}
    try:
        Sampling(**recommended).validate()
    except UsageError as error:
        raise ConfigError(f"generation_config.json: {error}; a setting of your own overrides it") from error
    given = recommended | own
    preset = THINKING if thinking else ANSWERING
    if 0 in (given.get("temperature"), given.get("top_p")):
        preset = Sampling()
    return replace(preset, **given).validate()


def _given_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in fields(Sampling) if values.get(f.name) is not None}


def _model_values(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    given = _given_values(generation_config)
    given.pop("seed", None)  # a downloaded file must not make all replies the same
    if generation_config.get("do_sample") is False:
        given["temperature"] = 0
    return given


class SamplerState(NamedTuple):
    """The sampler's state between two ids of one reply."""

    key: mx.array  # the next random key
    counts: mx.array | None  # [V] int32, how often each id was generated; None without penalties


Sampler = Callable[[mx.array, SamplerState], tuple[mx.array, SamplerState]]


def initial_state(settings: Sampling, vocab_size: int) -> SamplerState:
    """Return the state before the first id of a reply."""
    seed = secrets.randbits(63) if settings.seed is None else settings.seed
    return SamplerState(mx.random.key(seed), mx.zeros([vocab_size], mx.int32) if settings.penalizes else None)


def count_token(state: SamplerState, token: mx.array | int) -> SamplerState:
    """Return `state` after `token`, an id or an array [], was generated; a sampler does this itself."""
    if state.counts is None:
        return state
    return state._replace(counts=state.counts.at[token].add(1))


def make_sampler(settings: Sampling) -> Sampler:
    """Return a function from logits [V] of any float dtype and a state to an id [] uint32 and the next state.

    It is pure: to undo a draw, keep the state from before it.
    """

    def sample(logits: mx.array, state: SamplerState) -> tuple[mx.array, SamplerState]:
        logits = penalize(logits.astype(mx.float32), state.counts, settings)
        if settings.greedy:
            token = mx.argmax(logits)
        else:
            key, this = mx.random.split(state.key)
            token = draw(*candidates(logits, settings), this, logits.shape[0])
            state = state._replace(key=key)
        return token, count_token(state, token)

    return sample


def penalize(logits: mx.array, counts: mx.array | None, settings: Sampling) -> mx.array:
    """Penalize logits [V] for ids generated `counts` [V] times: repetition, presence, then frequency."""
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


def sort_top_k(logits: mx.array, k: int = 0) -> tuple[mx.array, mx.array]:
    """Return the `k` highest of logits [V], or all for 0: values [k] from high to low, and ids [k] uint32.

    Sorts only the members of the `k` chunks with the highest maxima: any other id ranks behind these `k`
    maxima. Exact, ties included, because argsort is stable and ids stay in ascending order until the end.
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
    """Return the power of two that best balances the numbers of chunk maxima and of winners' members."""
    return 1 << round(math.log2(size / k) / 2)


def _winning_chunks(logits: mx.array, k: int, chunk: int) -> tuple[mx.array, mx.array]:
    """Return the members of the `k` chunks with the highest maxima, and their ids; both [k * chunk].

    Ids ascend. The last chunk is padded with -inf, which ranks behind every real id.
    """
    padding = -logits.shape[0] % chunk
    if padding:
        logits = mx.pad(logits, (0, padding), constant_values=-math.inf)
    rows = logits.reshape(-1, chunk)  # [ceil(V / chunk), chunk]
    winners = mx.sort(mx.argsort(-rows.max(axis=-1))[:k])
    ids = winners[:, None] * chunk + mx.arange(chunk, dtype=mx.uint32)
    return rows[winners].flatten(), ids.flatten()


def top_p_mask(probs: mx.array, top_p: float) -> mx.array:
    """Return the mask of the smallest set that sums to `top_p`; `probs` descend and sum to 1."""
    return mx.cumsum(probs, inclusive=False) < top_p


def min_p_mask(probs: mx.array, min_p: float) -> mx.array:
    """Return the mask of the `probs` that are at least `min_p` times the highest."""
    return probs >= min_p * probs.max()


def candidates(logits: mx.array, settings: Sampling) -> tuple[mx.array, mx.array | None]:
    """Return log weights [n], -inf where top-p or min-p exclude an id, and ids [n]; None means 0 to V - 1.

    Dividing by the temperature does not change the order, so top-k may come first.
    """
    ids = None
    if settings.top_k > 0 or settings.top_p < 1:
        logits, ids = sort_top_k(logits, settings.top_k)
    # the highest becomes 0, so that no temperature overflows
    scores = (logits - logits.max()) / settings.temperature
    probs = mx.softmax(scores)
    if settings.top_p < 1:
        scores = mx.where(top_p_mask(probs, settings.top_p), scores, -math.inf)
    if settings.min_p > 0:
        scores = mx.where(min_p_mask(probs, settings.min_p), scores, -math.inf)
    return scores, ids


def draw(scores: mx.array, ids: mx.array | None, key: mx.array, vocab_size: int) -> mx.array:
    """Draw one of `ids` [n], or of 0 to n - 1 for None, with probabilities softmax(`scores` [n]).

    Random numbers belong to ids, not to ranks: similar distributions mostly draw the same id from one key.
    """
    if ids is None:
        return mx.random.categorical(scores, key=key)
    return ids[mx.argmax(scores + _noise(ids, key, vocab_size))]


def _noise(ids: mx.array, key: mx.array, vocab_size: int) -> mx.array:
    """Return Gumbel noise [n] for `ids` [n], where an id always has the same under one key."""
    if ids.size > vocab_size // FEW_IDS:
        return mx.random.gumbel([vocab_size], key=key)[ids]
    keys = mx.stack([key[0] ^ ids, mx.broadcast_to(key[1], ids.shape)], axis=-1)  # [n, 2]
    return mx.vmap(lambda key: mx.random.gumbel((), key=key))(keys)


def probabilities(logits: mx.array, counts: mx.array | None, settings: Sampling) -> mx.array:
    """Return the probabilities [V] with which a sampler draws the ids from logits [V].

    `counts` are those of its state.
    """
    scores, ids = candidates(penalize(logits.astype(mx.float32), counts, settings), settings)
    probs = mx.softmax(scores)
    return probs if ids is None else mx.zeros(logits.shape, mx.float32).at[ids].add(probs)
