"""The KL divergence of many variants' outputs from the exact ones, over the whole vocabulary.

Reads the output head in slices and never holds all logits. With p the exact distribution and d the difference
of logits, KL = log(1 + sum p (e^d - 1)) - sum p d, which keeps its digits where d is small.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..checkpoint.packed import Geometry
from ..conversion.source import Source, to_dense
from ..machine.backend import mx
from ..model.layers import rms_norm
from .design import EMBEDDING, HEAD
from .exact_layer import round_weight

SLICE_NBYTES = 256 << 20  # of the head's rows in float32
LOGITS_NBYTES = 64 << 20
MAX_DIFFERENCE = 60.0  # of logits; beyond it e^d leaves float32


@dataclass(frozen=True)
class Output:
    """A variant: `state` loads what leaves its last layer [W, T, hidden]; its head is rounded to `head`."""

    state: Callable[[], mx.array]
    head: Geometry | None = None


def divergences(
    source: Source, reference: mx.array, outputs: Mapping[str, Output], tick: Callable[[], None]
) -> dict[str, float]:
    """Return the mean KL(reference || variant) in nats of each variant; calls `tick` once for each."""
    exact = _final(source, reference)  # [N, hidden]
    total = mx.logsumexp(
        mx.stack([mx.logsumexp(exact @ rows.T, axis=-1) for rows in _head_slices(source, len(exact))]), axis=0
    )
    mx.eval(total)  # [N]
    sums = {name: (mx.zeros(len(exact)), mx.zeros(len(exact))) for name in outputs}
    spans = list(_spans(source, len(exact)))
    for index, rows in enumerate(_head_slices(source, len(exact))):
        logits = exact @ rows.T
        shares = mx.exp(logits - total[:, None])
        mx.eval(logits, shares)
        rounded = {
            code: round_weight(rows, code, mx.float32) for code in {o.head for o in outputs.values()} if code
        }
        for name, output in outputs.items():
            head = rounded[output.head] if output.head else rows
            difference = _final(source, output.state()) @ head.T - logits
            sums[name] = _add(sums[name], shares, difference)
            if index == len(spans) - 1:
                tick()
    return {name: _mean(first, second) for name, (first, second) in sums.items()}


def _add(
    sums: tuple[mx.array, mx.array], shares: mx.array, difference: mx.array
) -> tuple[mx.array, mx.array]:
    """Add a slice [N, rows] to the sums [N] of p d and p (e^d - 1)."""
    difference = mx.clip(difference, -MAX_DIFFERENCE, MAX_DIFFERENCE)
    first = sums[0] + (shares * difference).sum(axis=-1)
    second = sums[1] + (shares * mx.expm1(difference)).sum(axis=-1)
    mx.eval(first, second)
    return first, second


def _mean(first: mx.array, second: mx.array) -> float:
    value = float(mx.maximum(mx.log1p(second) - first, 0.0).mean())
    return value if math.isfinite(value) else MAX_DIFFERENCE


def _final(source: Source, state: mx.array) -> mx.array:
    """Normalise what leaves the last layer [W, T, hidden]; returns [W * T, hidden]."""
    norm = to_dense(source.read("norm"), mx.float32)
    return rms_norm(state.reshape(-1, state.shape[-1]), norm, source.config.rms_norm_eps)


def _head_slices(source: Source, tokens: int) -> Iterator[mx.array]:
    """Yield the rows of the output head [rows, hidden] in float32, some at a time."""
    for begin, end in _spans(source, tokens):
        rows = to_dense(source.read(head_name(source), begin, end), mx.float32)
        mx.eval(rows)
        yield rows


def _spans(source: Source, tokens: int) -> Iterator[tuple[int, int]]:
    """Cut the head where the source can: both the rows and the logits of `tokens` tokens stay small."""
    most = max(1, min(SLICE_NBYTES // (4 * source.config.hidden_size), LOGITS_NBYTES // (4 * tokens)))
    begin = 0
    for _, end in (cuts := list(source.slices(head_name(source)))):
        if end - begin >= most or end == cuts[-1][1]:
            yield begin, end
            begin = end


def head_name(source: Source) -> str:
    """Return the name of the matrix that makes the logits."""
    return EMBEDDING if source.config.tie_word_embeddings else HEAD
