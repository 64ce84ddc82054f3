"""A decode step of the whole model on kernels, with one compiled function between each two attentions.

On a fast GPU a step takes as long as the host needs to build and launch it, so as little as possible is done
layer by layer. Attention stays outside the compiled functions, because KV caches grow in place.
"""

from collections.abc import Callable, Sequence

from ..kernels import decode_attention
from ..machine.backend import fuse, mx
from .cache import Cache, SpeculativeStates, as_delta_state
from .fused_layers import FusedAttentionLayer, FusedDeltaLayer
from .layers import Layer

FusedLayer = FusedAttentionLayer | FusedDeltaLayer
# (x [T, hidden], [the output of the attention before] or [], position [1], conv and state of each delta net)
# to (x, new convs and states, what the attention after needs or ())
Segment = Callable[
    [mx.array, list[mx.array], mx.array, list[mx.array]],
    tuple[mx.array, list[mx.array], tuple[mx.array, ...]],
]


class FusedDecoder:
    """The layers of a model as compiled segments with an attention between each two of them."""

    def __init__(self, layers: Sequence[FusedLayer]):
        self.layers = layers
        self._places = [i for i, layer in enumerate(layers) if isinstance(layer, FusedAttentionLayer)]
        self._attentions = [layer for layer in layers if isinstance(layer, FusedAttentionLayer)]
        bounds = list(zip([-1, *self._places], [*self._places, len(layers)], strict=True))
        self._nets = [range(before + 1, after) for before, after in bounds]
        self._segments, self._speculative_segments = (
            [fuse(_segment(layers, before, after, every=every)) for before, after in bounds]
            for every in (False, True)
        )

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> "FusedDecoder | None":
        """Return the decoder of `layers`; None unless all of them are fused."""
        fused = [layer for layer in layers if isinstance(layer, FusedAttentionLayer | FusedDeltaLayer)]
        return cls(fused) if len(fused) == len(layers) else None

    def __call__(self, x: mx.array, cache: Cache, *, speculative: bool = False) -> mx.array:
        """Map x [T, hidden] to the same shape, for T up to MAX_FUSED_ROWS; the caches move on by T tokens.

        After a `speculative` step `Cache.commit` may roll back the last ones.
        """
        segments = self._speculative_segments if speculative else self._segments
        offset = turned = decode_attention.position(cache.length)
        if shift := cache.shift:
            turned = decode_attention.position(cache.length + shift)
        mixed: list[mx.array] = []
        for number, (segment, nets) in enumerate(zip(segments, self._nets, strict=True)):
            memories = [as_delta_state(cache.layers[place]) for place in nets]
            states = [array for memory in memories for array in memory.arrays()]
            x, states, projected = segment(x, mixed, turned, states)
            for memory, conv, state in zip(memories, states[::2], states[1::2], strict=True):
                if speculative:
                    memory.speculative = SpeculativeStates(conv, state)
                else:
                    memory.conv, memory.state = conv, state
            if projected:
                attention, memory = self._attentions[number], cache.layers[self._places[number]]
                mixed = [attention.attend(projected, memory, offset)]  # [T, H*D]
        return x


def _segment(layers: Sequence[FusedLayer], before: int, after: int, *, every: bool) -> Segment:
    """Return the function between the attentions at `before` and `after`; -1 and len(layers) mean none.

    With `every` it returns the states after each token, along their first axis.
    """

    def run(
        x: mx.array, mixed: list[mx.array], turned: mx.array, states: list[mx.array]
    ) -> tuple[mx.array, list[mx.array], tuple[mx.array, ...]]:
        first = layers[before] if before >= 0 else None
        if isinstance(first, FusedAttentionLayer):
            x = first.after(x, mixed[0])
        new_states: list[mx.array] = []
        for place in range(before + 1, after):
            layer, at = layers[place], 2 * (place - before - 1)
            if isinstance(layer, FusedDeltaLayer):
                x, *new = layer.forward_fused(x, states[at], states[at + 1], every=every)
                new_states += new
        last = layers[after] if after < len(layers) else None
        return x, new_states, last.before(x, turned) if isinstance(last, FusedAttentionLayer) else ()

    return run
