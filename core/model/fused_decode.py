"""A few tokens through all layers by kernels: what lies between two attentions is one compiled function.

On a fast GPU one token's time is the host's, which builds and hands out what the device then does at once, so
as little as possible of it is done layer by layer. Caches grow in place, so attention itself stands between
the functions.
"""

from collections.abc import Callable, Sequence

from ..kernels import decode_attention
from ..machine.backend import fuse, mx
from .cache import Cache, DeltaState, KVCache
from .layers import AttentionLayer, DeltaLayer

Layer = AttentionLayer | DeltaLayer
# x [T, hidden], [attention's output] or none, the position [1], and states, to x and new states, then to
# what attention needs, or nothing
Stretch = Callable[
    [mx.array, list[mx.array], mx.array, list[mx.array]],
    tuple[mx.array, list[mx.array], tuple[mx.array, ...]],
]


class Steps:
    """Layers that all take few rows, as functions of their states."""

    def __init__(self, layers: Sequence[Layer]):
        places = [i for i, layer in enumerate(layers) if isinstance(layer, AttentionLayer)]
        bounds = list(zip([-1, *places], [*places, len(layers)], strict=True))
        self._nets = [range(before + 1, after) for before, after in bounds]
        self._attentions = [layer for layer in layers if isinstance(layer, AttentionLayer)]
        self._places = places
        self._stretches = [fuse(_stretch(layers, before, after)) for before, after in bounds]

    def __call__(self, x: mx.array, cache: Cache) -> mx.array:
        """x [T, hidden] with few T to the same shape; the cache grows by T."""
        offset = decode_attention.position(cache.length)
        mixed: list[mx.array] = []
        for number, (stretch, nets) in enumerate(zip(self._stretches, self._nets, strict=True)):
            memories = [cache.layers[place] for place in nets]
            states = [array for memory in memories for array in memory.arrays()]
            x, states, wanted = stretch(x, mixed, offset, states)
            for memory, conv, state in zip(memories, states[::2], states[1::2], strict=True):
                _set(memory, conv, state)
            if wanted:
                attention, memory = self._attentions[number], cache.layers[self._places[number]]
                mixed = [attention.few_attend(wanted, memory, offset)]
        return x


def _set(memory: KVCache | DeltaState, conv: mx.array, state: mx.array) -> None:
    if not isinstance(memory, DeltaState):
        raise TypeError("a delta net layer wants a DeltaState")
    memory.conv, memory.state = conv, state


def _stretch(layers: Sequence[Layer], before: int, after: int) -> Stretch:
    """From the attention at `before` to the one at `after`; either may not be there."""

    def run(
        x: mx.array, mixed: list[mx.array], offset: mx.array, states: list[mx.array]
    ) -> tuple[mx.array, list[mx.array], tuple[mx.array, ...]]:
        first = layers[before] if before >= 0 else None
        if isinstance(first, AttentionLayer):
            x = first.few_after(x, mixed[0])
        found: list[mx.array] = []
        for place in range(before + 1, after):
            layer, at = layers[place], 2 * (place - before - 1)
            if isinstance(layer, DeltaLayer):
                x, *new = layer.few(x, states[at], states[at + 1])
                found += new
        last = layers[after] if after < len(layers) else None
        return x, found, last.few_before(x, offset) if isinstance(last, AttentionLayer) else ()

    return run
