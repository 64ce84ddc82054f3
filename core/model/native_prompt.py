"""A prompt through one layer: MLX multiplies, and the library of `core/native` does what lies in between.

What MLX's CPU backend does in several passes over memory, norms, gates, the softmax and the whole delta rule,
is one pass here. Activations are float32.
"""

from ..machine.backend import mx
from ..native.library import Library
from ..native.structures import DeltaNet, copied
from ..ops.attention import attention
from .cache import DeltaState, KVCache
from .layers import AttentionLayer, DeltaLayer, DenseMLP, FeedForward


class NativePrompt:
    """The layers of one model, for any number of tokens x [1, T, hidden]."""

    def __init__(self, library: Library, eps: float):
        self._library, self._eps = library, eps

    def delta_layer(self, layer: DeltaLayer, net: DeltaNet, x: mx.array, memory: DeltaState) -> mx.array:
        """Return the layer's output [1, T, hidden]; the states of `memory` move on, in place."""
        qkv, z, a, b = layer.mixer.inputs(self._norm(x, layer.input_norm))
        window = mx.concatenate([memory.conv, qkv], axis=1)
        inputs = [window[0], z[0], a[0], b[0]]
        mixed = self._library.delta_rule(net, self._eps, inputs, memory.state)
        # the tail is copied: a slice would keep the whole window alive
        memory.conv = copied(window[:, x.shape[1] :])
        return self._leave(layer, x, layer.mixer.out(mixed[None]))

    def attention_layer(self, layer: AttentionLayer, x: mx.array, memory: KVCache) -> mx.array:
        """Return the layer's output [1, T, hidden]; the cache grows by T tokens."""
        mixer = layer.mixer
        q, k, v, gate = mixer.project(self._norm(x, layer.input_norm), memory.place)
        keys, values = memory.append(k, v)  # [1, Hkv, S, D]
        mixed = attention(q, keys, values, mixer.dim**-0.5, self._library.softmax)  # [1, H, T, D]
        return self._leave(layer, x, mixer.finish(mixed, gate))

    def _norm(self, x: mx.array, weight: mx.array) -> mx.array:
        return self._library.norm(x, weight.astype(mx.float32), self._eps)

    def _leave(self, layer: DeltaLayer | AttentionLayer, x: mx.array, mixed: mx.array) -> mx.array:
        """Return x + mixed and the feed-forward block on top, [1, T, hidden]."""
        x = x + mixed
        return x + self._feed_forward(layer.feed_forward, self._norm(x, layer.post_norm))

    def _feed_forward(self, block: FeedForward, x: mx.array) -> mx.array:
        if not isinstance(block, DenseMLP):
            return block(x)
        gate, up = block.gate_up(x)  # [1, T, intermediate]
        return block.down(self._library.gate(gate, up))
