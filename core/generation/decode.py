"""From ids to ids: prefill in chunks, decode one step ahead.

Logits never leave this module. Nothing here knows of messages, templates or text.
"""

from collections.abc import Callable, Iterator, Sequence

from ..machine.backend import mx, on_gpu
from ..model.cache import Cache
from ..model.network import Model
from .sampling import Sampling, count, sampler, start
from .speculate import MOST_DRAFTS, DraftingDecoder, read_ahead

# small enough that a stop during prefill is answered soon, large enough for full-speed products
PREFILL_CHUNK, GPU_PREFILL_CHUNK = 512, 2048


def prefill(
    model: Model,
    cache: Cache,
    ids: Sequence[int],
    cancelled: Callable[[], bool] = lambda: False,
    *,
    drafts: bool = False,
) -> Iterator[int]:
    """Read `ids` into the cache, yielding how many are read after each chunk.

    Stops early, between chunks, when `cancelled()`. With `drafts` the draft head reads the end as well.
    """
    size = min(GPU_PREFILL_CHUNK if on_gpu() else PREFILL_CHUNK, model.plan.chunk if model.plan else 1 << 30)
    for begin in range(0, len(ids), size):
        if cancelled():
            return
        chunk = ids[begin : begin + size]
        before = cache.hidden
        hidden = model.hidden(chunk, cache)
        if drafts and begin + len(chunk) == len(ids):
            read_ahead(model, cache, list(chunk), before, hidden)
        mx.eval(cache.arrays())
        mx.clear_cache()
        yield begin + len(chunk)


class Decoder:
    """Draws one id after another; the step after the id in hand is already computing.

    After `next` returned an id the cache has read it, so cache and ids agree wherever a reply ends.
    """

    def __init__(self, model: Model, cache: Cache, settings: Sampling):
        """`cache` has read the whole prompt, one id at least."""
        if cache.hidden is None:
            raise ValueError("a cache that has read nothing predicts nothing")
        self._model, self._cache = model, cache
        self.drafted = self.accepted = 0
        self._sample = sampler(settings)
        self._state = start(settings, model.config.vocab_size)
        self._draw(cache.hidden)

    def next(self) -> int:
        """The next id; a later one is under way when this returns."""
        token = self._token
        self._draw(self._model.hidden(token[None], self._cache))
        return int(token)

    def force(self, token: int) -> None:
        """Let `token` be the next id, whatever was drawn."""
        self._token = mx.array(token, mx.uint32)
        self._state = count(self._before, token)

    def rank(self, token: int) -> int:
        """How many ids are likelier than `token` to come next."""
        return int((self._logits > self._logits[token]).sum())

    def finish(self) -> None:
        """The cache has read just what was handed out already."""

    def _draw(self, hidden: mx.array) -> None:
        self._logits = self._model.logits(hidden)[-1]
        self._before = self._state
        self._token, self._state = self._sample(self._logits, self._state)
        mx.async_eval(self._token)


AnyDecoder = Decoder | DraftingDecoder


def drafts_for(model: Model, wanted: int | None) -> int:
    """How many drafts at once a reply may have where so many are `wanted`, None for the usual."""
    if model.mtp is None:
        return 0
    usual = MOST_DRAFTS if on_gpu() else 0  # on a CPU reading a few tokens costs as much as they save
    return usual if wanted is None else min(wanted, MOST_DRAFTS)


def make_decoder(model: Model, cache: Cache, settings: Sampling, drafts: int) -> AnyDecoder:
    """What draws a reply's ids, with so many drafts at once."""
    return DraftingDecoder(model, cache, settings, drafts) if drafts else Decoder(model, cache, settings)
