"""The multi-token-prediction head: from a hidden state and the token after it, the token after that."""

from ..checkpoint.config import ModelConfig
from ..machine.backend import Policy, mx
from ..ops.linear import make_linear, prepare
from .cache import KVCache
from .layers import AttentionLayer, FeedForward, Named, rms_norm


class MTPHead:
    """One full-attention layer with its own cache; embedding and output head are the model's."""

    def __init__(self, config: ModelConfig, weights: Named, feed_forward: FeedForward, policy: Policy):
        layer = weights.within("layers.0")
        self.eps = config.rms_norm_eps
        self.fc = make_linear(prepare(weights["fc"], policy))
        self.embedding_norm = weights.vector("pre_fc_norm_embedding")
        self.hidden_norm = weights.vector("pre_fc_norm_hidden")
        self.norm = weights.vector("norm")
        self.layer = AttentionLayer(config, layer, feed_forward, policy)

    def __call__(self, embedding: mx.array, hidden: mx.array, cache: KVCache) -> mx.array:
        """Embeddings of tokens i+1 and hidden states after the final norm of tokens i, both [B, T, hidden];
        returns hidden states [B, T, hidden] from which the output head predicts tokens i+2."""
        pair = [
            rms_norm(embedding, self.embedding_norm, self.eps),
            rms_norm(hidden, self.hidden_norm, self.eps),
        ]
        x = self.layer(self.fc(mx.concatenate(pair, axis=-1)), cache)
        return rms_norm(x, self.norm, self.eps)
