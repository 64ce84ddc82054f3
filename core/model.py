"""The whole network: token ids to hidden states to logits, over a `Cache` that the caller owns."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .backend import Policy, choose_policy, mx
from .cache import Cache, KVCache
from .config import ModelConfig
from .kernels.linear import Embedding, make_linear, prepare
from .layers import AttentionLayer, DeltaLayer, DenseMLP, FeedForward, Named, rms_norm
from .moe import MixtureOfExperts
from .mtp import MTPHead
from .ranks import joined, share, shares_head
from .weights import Weights, load_weights


class Model:
    """Immutable after construction; `repairs` say what the loader made of the folder."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        policy: Policy,
        gather: Callable[[mx.array], mx.array] | None = None,
    ):
        """`gather` joins the logits of ranks that share the output head."""
        named = Named(weights.tensors)
        self.config, self.policy = config, policy
        self.nbytes, self.parameters = weights.nbytes, weights.parameters
        self.repairs = weights.repairs
        table = prepare(named["embed_tokens"], policy)
        self.embed = Embedding(table, policy.activations)
        tied = config.tie_word_embeddings
        self.head = make_linear(table if tied else prepare(named["lm_head"], policy), gather)
        self.layers = [
            self._layer(named.within(f"layers.{i}"), kind) for i, kind in enumerate(config.layer_types)
        ]
        self.norm = named.vector("norm")
        mtp = named.within("mtp")
        ahead = self._feed_forward(mtp.within("layers.0.mlp")) if weights.has_mtp else None
        self.mtp = MTPHead(config, mtp, ahead, policy) if ahead else None

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> "Model":
        """Read the weights of `folder`, of several ranks each its share. Raises ModelError, UsageError."""
        weights, ranks = load_weights(folder, config), joined()
        policy = choose_policy(weights.parameters)
        if ranks is None:
            return cls(config, weights, policy)
        gather = ranks.gather if shares_head(config, ranks) else None
        own, weights = share(config, weights, ranks)
        return cls(own, weights, replace(policy, sum=ranks.sum), gather)

    def _layer(self, weights: Named, kind: str) -> AttentionLayer | DeltaLayer:
        make = AttentionLayer if kind == "full_attention" else DeltaLayer
        return make(self.config, weights, self._feed_forward(weights.within("mlp")), self.policy)

    def _feed_forward(self, weights: Named) -> FeedForward:
        if self.config.is_moe:
            return MixtureOfExperts(self.config, weights, self.policy)
        return DenseMLP(weights, self.policy)

    def new_cache(self, *, quantized: bool = False) -> Cache:
        """A cache that has read nothing; `quantized` keeps keys and values at 8 bits."""
        return Cache.empty(self.config, self.policy.activations, quantized=quantized)

    def hidden(self, ids: mx.array | Sequence[int], cache: Cache) -> mx.array:
        """Read ids [T] into the cache; returns the hidden states [1, T, hidden] after the final norm."""
        ids = ids if isinstance(ids, mx.array) else mx.array(list(ids))
        x = self.embed(ids[None])
        for layer, memory in zip(self.layers, cache.layers, strict=True):
            x = layer(x, memory)
        x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        cache.length += ids.size
        cache.hidden = x[:, -1:]
        return x

    def tentative(self, ids: mx.array, cache: Cache) -> mx.array:
        """`hidden` for a few ids, of which `cache.keep` will let only some count; leaves `cache.hidden`."""
        x = self.embed(ids[None])
        for layer, memory in zip(self.layers, cache.layers, strict=True):
            x = layer.tentatively(x, memory)
        cache.length += ids.size
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def ahead(self, ids: mx.array, hidden: mx.array, cache: KVCache) -> mx.array:
        """The draft head's hidden states [1, T, hidden] for ids [T], each with the hidden state before it."""
        if self.mtp is None:
            raise ValueError("this model has no draft head")
        return self.mtp(self.embed(ids[None]), hidden, cache)

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states [1, T, hidden] to logits [T, V] in float32."""
        return self.head(hidden)[0].astype(mx.float32)
