"""The multi-token-prediction head: from a hidden state and the token after it, the token after that."""

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import WeightScope
from ..machine.backend import Policy, mx
from ..ops.linear import make_linear, materialize
from .cache import KVCache
from .layers import Layer, rms_norm


class MTPHead:
    """One attention layer with a cache of its own; embedding and output head are the model's."""

    def __init__(self, config: ModelConfig, weights: WeightScope, layer: Layer, policy: Policy):
        self.eps = config.rms_norm_eps
        self.fc = make_linear(materialize(weights["fc"], policy))
        self.embedding_norm = weights.vector("pre_fc_norm_embedding")
        self.hidden_norm = weights.vector("pre_fc_norm_hidden")
        self.norm = weights.vector("norm")
        self.layer = layer

    def __call__(self, embedding: mx.array, hidden: mx.array, cache: KVCache) -> mx.array:
        """Return hidden states [B, T, hidden] from which the output head predicts tokens i+2.

        `embedding` [B, T, hidden] is of tokens i+1, `hidden` [B, T, hidden] after the final norm of tokens i.
        """
        pair = [
            rms_norm(embedding, self.embedding_norm, self.eps),
            rms_norm(hidden, self.hidden_norm, self.eps),
        ]
        x = self.layer(self.fc(mx.concatenate(pair, axis=-1)), cache)  # [B, T, hidden]
        return rms_norm(x, self.norm, self.eps)
