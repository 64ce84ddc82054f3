"""The whole network: token ids to hidden states to logits, over a `Cache` that the caller owns."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import Progress, Watched, Weights, load_weights
from ..engine.ranks import joined, share, shares_head
from ..machine.backend import Policy, choose_policy, mx
from ..machine.device import step_nbytes
from ..ops.fused_matvec import MAX_ROWS
from ..ops.linear import Embedding, make_linear, prepare
from ..ops.self_test import settle
from .cache import QUANTIZED_BITS, Cache, DeltaState, KVCache
from .fused_decode import Steps
from .layers import AttentionLayer, DeltaLayer, DenseMLP, FeedForward, Named, rms_norm
from .memory_plan import MemoryPlan, fit, need_of, plan_memory
from .moe import MixtureOfExperts
from .mtp import MTPHead
from .native_decode import NativeDecode, may_run


class Model:
    """Immutable after construction; `repairs` say what the loader made of the folder."""

    shared = False  # whether other processes hold parts of it, and of its caches

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        policy: Policy,
        progress: Progress | None = None,
        gather: Callable[[mx.array], mx.array] | None = None,
        plan: MemoryPlan | None = None,
    ):
        """`gather` joins the logits of ranks that share the output head; `plan` is None where memory is no
        question."""
        named = Named(Watched(weights, progress) if progress else weights.tensors)
        refusal = settle()
        if refusal:
            policy = replace(policy, notices=(*policy.notices, refusal))
        self.config, self.policy, self.plan = config, policy, plan
        self.gathers = gather is not None
        # bytes read for a token by MLX, by the step in C
        self._step_nbytes = [step_nbytes(weights.tensors, config, some) for some in (policy, None)]
        self.nbytes, self.parameters = weights.nbytes, weights.parameters
        self.repairs = weights.repairs
        table = prepare(named["embed_tokens"], policy)
        self.embed = Embedding(table, policy.activations)
        tied = config.tie_word_embeddings
        self.head = make_linear(table if tied else prepare(named["lm_head"], policy), gather)
        self.layers = [
            self._layer(named.within(f"layers.{i}"), kind) for i, kind in enumerate(config.layer_types)
        ]
        takes_few = policy.activations == mx.bfloat16 and all(layer.takes_few() for layer in self.layers)
        # not for whoever puts something between the layers' parts later
        self.steps = Steps(self.layers) if takes_few else None
        self.norm = named.vector("norm")
        self.native = self._native(weights, shared=self.gathers)
        mtp = named.within("mtp")
        ahead = self._feed_forward(mtp.within("layers.0.mlp")) if weights.has_mtp else None
        self.mtp = MTPHead(config, mtp, ahead, policy) if ahead else None

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, progress: Progress | None = None) -> Self:
        """Read the weights of `folder`, of several ranks each its share; tells `progress` once all is checked
        and before each of them.

        Raises ModelError and its children, DoesNotFit, UsageError where ranks cannot share the model, and
        what `progress` raises.
        """
        ranks = joined()
        weights = load_weights(folder, config)
        policy, gather = choose_policy(weights.parameters), None
        if ranks is not None:
            gather = ranks.gather if shares_head(config, ranks) else None
            config, weights = share(config, weights, ranks)
            policy = replace(policy, sum=ranks.sum)
        sharers = 1 if ranks is None else ranks.sharers()
        plan = plan_memory(config, weights, policy, name=folder.resolve().name, sharers=sharers)
        return cls(config, weights, policy, progress, gather, plan)

    def _layer(self, weights: Named, kind: str) -> AttentionLayer | DeltaLayer:
        make = AttentionLayer if kind == "full_attention" else DeltaLayer
        return make(self.config, weights, self._feed_forward(weights.within("mlp")), self.policy)

    def _feed_forward(self, weights: Named) -> FeedForward:
        if self.config.is_moe:
            return MixtureOfExperts(self.config, weights, self.policy)
        return DenseMLP(weights, self.policy)

    def _native(self, weights: Weights, *, shared: bool) -> NativeDecode | None:
        """The step in C, in use from now or later; None where it cannot be."""
        if shared or not may_run(self.config, self.policy):
            return None
        native = NativeDecode(self.config, weights.tensors)
        native.adopt()
        if native.notice:
            self.policy = replace(self.policy, notices=(*self.policy.notices, native.notice))
            return None
        return native

    @property
    def step_nbytes(self) -> int:
        """Bytes of weights that are read to decode one token."""
        return self._step_nbytes[self.native is not None and self.native.is_used]

    @property
    def context(self) -> int:
        """How many tokens a conversation may have with keys and values at full width: as many as the model is
        made for and the memory holds."""
        longest = self.config.max_position_embeddings
        return longest if self.plan is None else min(longest, self.plan.context)

    def plan_for(self, context: int | None, *, quantized: bool) -> MemoryPlan | None:
        """The plan for a conversation of `context` tokens, or as many as fit, with keys and values as
        `new_cache` makes them; None where memory is no question. Raises DoesNotFit, UsageError."""
        if self.plan is None:
            return None
        bits = QUANTIZED_BITS if quantized else None
        return fit(
            need_of(self.config, self.plan.weights_nbytes, self.policy, kv_bits=bits),
            longest=self.config.max_position_embeddings,
            free_nbytes=self.plan.free_nbytes,
            context=context,
            name="this model",
        )

    def new_cache(self, *, quantized: bool = False) -> Cache:
        """A cache that has read nothing; `quantized` keeps keys and values at 8 bits."""
        return Cache.empty(self.config, self.policy.activations, quantized=quantized)

    def warm_up(self) -> None:
        """Have the kernels of a prompt and of a step compiled, so that no reply waits for them."""
        cache = self.new_cache()
        for length in (2 * MAX_ROWS, 1):
            mx.eval(self.logits(self.hidden([0] * length, cache)[:, -1:]))

    def hidden(self, ids: mx.array | Sequence[int], cache: Cache) -> mx.array:
        """Read ids [T] into the cache; returns the hidden states [1, T, hidden] after the final norm."""
        ids = ids if isinstance(ids, mx.array) else mx.array(list(ids))
        if self.native and self.native.takes(ids.size, cache):
            x = self.native.hidden(ids.tolist(), cache)  # pyright: ignore[reportArgumentType]
        else:
            x = self._plain_hidden(ids, cache, self.native)
            if self.native and ids.size > MAX_ROWS:
                self.native.adopt(self._plain_hidden)
        cache.length += ids.size
        cache.hidden = x[:, -1:]
        return x

    def _plain_hidden(self, ids: mx.array, cache: Cache, native: NativeDecode | None = None) -> mx.array:
        """The same by MLX, with `native` but for delta nets; leaves `cache.length` and `cache.hidden`."""
        native = native if native and native.is_used and ids.size > MAX_ROWS else None
        steps = self.steps if ids.size <= MAX_ROWS and not cache.quantized else None
        if steps:
            x = steps(self.embed(ids), cache)[None]
        else:
            x = self.embed(ids[None])
            for number, (layer, memory) in enumerate(zip(self.layers, cache.layers, strict=True)):
                if native and isinstance(layer, DeltaLayer) and isinstance(memory, DeltaState):
                    x = native.read(number, layer, x, memory)
                else:
                    x = layer(x, memory)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def tentative(self, ids: mx.array, cache: Cache) -> mx.array:
        """`hidden` for a few ids, of which `cache.keep` will let only some count; leaves `cache.hidden`."""
        if self.native and self.native.takes(ids.size, cache):
            x = self.native.tentative(ids.tolist(), cache)  # pyright: ignore[reportArgumentType]
        else:
            x = self.embed(ids[None])
            for layer, memory in zip(self.layers, cache.layers, strict=True):
                x = layer.tentatively(x, memory)
            x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        cache.length += ids.size
        return x

    def ahead(self, ids: mx.array, hidden: mx.array, cache: KVCache) -> mx.array:
        """The draft head's hidden states [1, T, hidden] for ids [T], each with the hidden state before it."""
        if self.mtp is None:
            raise ValueError("this model has no draft head")
        return self.mtp(self.embed(ids[None]), hidden, cache)

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states [1, T, hidden] to logits [T, V] in float32."""
        found = self.native.logits(hidden) if self.native else None
        return found if found is not None else self.head(hidden)[0].astype(mx.float32)
