"""The probabilities of a reply that is there already, by one pass over its exact ids.

Reads on a copy of a kept state, or on a cache of its own: conversation and live state stay as they are.
The figures are those of the model's own distribution, which temperature and penalties do not change.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..events import Logprobs, Prefill
from ..generation.decode import prefill
from ..generation.logprobs import describe_draw, rank_each
from ..model.cache import Cache
from ..text.reply_parser import ThinkSplitter, leaves_thought_open
from .transcript import Output, branch

if TYPE_CHECKING:
    from .session import Session


def score_reply(
    session: "Session", turn: int, count: int, cancelled: Callable[[], bool] = lambda: False
) -> Iterator[Prefill | Logprobs]:
    """Yield the progress of reading, then how likely each id of the reply in `turn` was, with `count` others.

    Delimiters of thoughts and the end of the turn are left out. Ends early when `cancelled()`. Raises
    UsageError for an unknown turn.
    """
    output, tokenizer = _reply(session, turn), session.engine.tokenizer
    ids = session.encoder.branch_ids(branch(output), session.history)
    prompt = ids[: len(ids) - len(output.ids)]
    cache = _known_state(session, prompt)
    known = cache.length
    yield Prefill(known, len(prompt), known)
    for done in prefill(session.engine.model, cache, prompt[known:], cancelled):
        yield Prefill(known + done, len(prompt), known)
    splitter = ThinkSplitter(
        tokenizer.think_open_id, tokenizer.think_close_id, leaves_thought_open(prompt, tokenizer)
    )
    if cache.length < len(prompt):  # cancelled
        return
    scored = 0
    for rankings in rank_each(session.engine.model, cache, output.ids, count):
        for token, ranking in zip(output.ids[scored:], rankings, strict=False):
            kind = splitter.add(token)
            if kind is not None and token not in tokenizer.stop_ids:
                yield describe_draw(tokenizer, token, ranking, in_thought=kind == "thought")
        scored += len(rankings)
        if cancelled():
            return


def _reply(session: "Session", turn: int) -> Output:
    """Return the reply in `turn` of the current branch. Raises UsageError for another number."""
    nodes = session.tree.branch()
    reply = nodes[nodes.index(session.tree.question(turn)) + 1]
    if not isinstance(reply, Output):
        raise UsageError(f"question {turn} has no reply yet")
    return reply


def _known_state(session: "Session", prompt: list[int]) -> Cache:
    """Return a cache that has read a prefix of `prompt`, the longest of which a snapshot is kept."""
    live = session.live
    snapshot = live.snapshots.find(prompt)
    if snapshot is None:
        return session.engine.model.new_cache(quantized=live.quantized_kv)
    cache = snapshot.cache.copy()
    cache.own()
    return cache
