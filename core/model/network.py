"""The whole network: token ids to hidden states to logits, over a `Cache` that the caller owns.

Knows neither folders nor ranks: weights, policy and memory plan come from the builders in `engine.loading`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..checkpoint.config import ModelConfig
from ..checkpoint.finite import CheckedTensors
from ..checkpoint.weights import Progress, Watched, Weights, WeightScope
from ..errors import WeightsError
from ..machine.backend import Policy, mx
from ..native.library import MAX_ROWS
from ..ops.candidates import Dimensions
from ..ops.fused_matvec import MAX_FUSED_ROWS, Norm
from ..ops.linear import Embedding, make_linear, materialize
from ..ops.tuning import settle
from .cache import QUANTIZED_BITS, Cache, DeltaState, KVCache
from .fused_decode import FusedDecoder
from .fused_layers import kernel_form, layer_forms, plain_form
from .layers import AttentionLayer, DeltaLayer, DenseMLP, Layer, rms_norm
from .memory_figures import MemoryPlan
from .memory_plan import fit, need_of
from .moe import MixtureOfExperts
from .mtp import MTPHead
from .native_decode import NativeDecode, may_run
from .step_graph import Ends, StepGraph
from .weight_traffic import step_nbytes


class MixedTokens(NamedTuple):
    """Some tokens of a prompt with pictures: `ids` [T], of which those at `places` are embedded otherwise.

    `embeddings` [P, hidden] are those of the pictures' tokens, and each array of `deepstack` is added to
    theirs after one of the first layers. `positions` [3, T] are moment, row and column of all tokens; those
    of later text are their index plus `shift`.
    """

    ids: mx.array
    places: mx.array
    embeddings: mx.array
    deepstack: Sequence[mx.array]
    positions: mx.array
    shift: int


def make_layer(
    config: ModelConfig, weights: WeightScope, kind: str, policy: Policy
) -> AttentionLayer | DeltaLayer:
    """Build a plain decoder layer from its weights; `kind` is `full_attention` or `linear_attention`."""
    inner = weights.within("mlp")
    feed_forward = MixtureOfExperts(config, inner, policy) if config.is_moe else DenseMLP(inner, policy)
    make = AttentionLayer if kind == "full_attention" else DeltaLayer
    return make(config, weights, feed_forward, policy)


class Model:
    """A network with its weights. `repairs` are sentences about what loading the folder had to correct."""

    shared = False  # whether other processes hold parts of the model and of its caches
    explain_failure: Callable[[], str] = staticmethod(lambda: "the model's outputs are not finite numbers")

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        policy: Policy,
        progress: Progress | None = None,
        gather: Callable[[mx.array], mx.array] | None = None,
        plan: MemoryPlan | None = None,
    ):
        """Read and evaluate all weights, one after the other, reporting each to `progress`.

        `gather` joins the logits of ranks that share the output head; `plan` is None for unlimited memory.
        """
        dimensions = Dimensions.of(config, weights.tensors, policy)
        self.tuner, refusals = settle(
            dimensions, lambda text: progress(0, weights.nbytes, text) if progress else None
        )
        policy = replace(policy, notices=(*policy.notices, *refusals))
        self.config, self.policy, self.plan = config, policy, plan
        self.gathers = gather is not None
        # bytes read for a token by MLX, by the step in C
        self._step_nbytes = [step_nbytes(weights.tensors, config, some) for some in (policy, None)]
        self.nbytes, self.parameters = weights.nbytes, weights.parameters
        self.repairs = weights.repairs
        tensors = CheckedTensors(Watched(weights, progress) if progress else weights.tensors)
        scope = WeightScope(tensors)
        self._proven = False
        table, tied = materialize(scope["embed_tokens"], policy), config.tie_word_embeddings
        self.embed = Embedding(table, policy.activations)
        self.head = make_linear(table if tied else materialize(scope["lm_head"], policy), gather)
        self.layers = [
            self._layer(scope.within(f"layers.{i}"), kind) for i, kind in enumerate(config.layer_types)
        ]
        self.fused_decoder = FusedDecoder.of(self.layers)
        self.norm = scope.vector("norm")
        self.graph = self._step_graph()
        self._latest: tuple[mx.array | None, mx.array | None] = None, None  # a hidden state and its logits
        self.native = self._native(weights, shared=self.gathers)
        self.mtp = self._mtp_head(scope.within("mtp")) if weights.has_mtp else None

    def _layer(self, weights: WeightScope, kind: str) -> Layer:
        return kernel_form(make_layer(self.config, weights, kind, self.policy), self.policy)

    def _mtp_head(self, weights: WeightScope) -> MTPHead:
        layer = self._layer(weights.within("layers.0"), "full_attention")
        return MTPHead(self.config, weights, layer, self.policy)

    def hidden(self, ids: mx.array | Sequence[int], cache: Cache) -> mx.array:
        """Read ids [T] into the cache; return the hidden states [1, T, hidden] after the final norm."""
        ids = ids if isinstance(ids, mx.array) else mx.array(list(ids))
        native = self.native
        if native and native.supports(ids.size, cache):
            x = native.hidden(ids.tolist(), cache)  # pyright: ignore[reportArgumentType]
        elif self.graph and self.graph.takes(ids, cache):
            rows, logits = self.graph.read(ids, cache, self._read_fused)
            x = rms_norm(rows[None], self.norm, self.config.rms_norm_eps)
            self._latest = x, logits
        else:
            x = self._mlx_hidden(ids, cache, native)
            self._start(x, cache)
            if native and ids.size > MAX_FUSED_ROWS:
                native.adopt(self._mlx_hidden)
        cache.length += ids.size
        cache.hidden = x[:, -1:]
        return x

    def hidden_with_images(self, tokens: MixedTokens, cache: Cache) -> mx.array:
        """Do what `hidden` does for tokens of which some are those of pictures."""
        native = self.native if self.native and self.native.is_used else None
        native = native if tokens.ids.size > MAX_FUSED_ROWS else None
        x = self.embed(tokens.ids[None])  # [1, T, hidden]
        x[:, tokens.places] = tokens.embeddings.astype(x.dtype)
        with cache.placed_at(tokens.positions, tokens.shift):
            for number, (layer, memory) in enumerate(zip(self.layers, cache.layers, strict=True)):
                x = native.read_prompt(number, layer, x, memory) if native else layer(x, memory)
                if number < len(tokens.deepstack):
                    x[:, tokens.places] += tokens.deepstack[number].astype(x.dtype)
        self._start(x, cache)
        if self.native and tokens.ids.size > MAX_FUSED_ROWS:
            self.native.adopt(self._mlx_hidden)
        x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        cache.length += tokens.ids.size
        cache.hidden = x[:, -1:]
        return x

    def _start(self, x: mx.array, cache: Cache) -> None:
        """Have the device compute x and the states after it before a graph may write those before it."""
        if self.graph:
            tried = [layer.speculative for layer in cache.layers if isinstance(layer, DeltaState)]
            mx.async_eval(x, cache.arrays(), [tuple(one) for one in tried if isinstance(one, tuple)])

    def _read_fused(self, ids: mx.array, cache: Cache) -> mx.array:
        """Read a few ids by the fused layers; return x [T, hidden] before the final norm."""
        if self.fused_decoder is None:
            raise ValueError("some layers are not fused")
        return self.fused_decoder(self.embed(ids), cache)

    def _mlx_hidden(self, ids: mx.array, cache: Cache, native: NativeDecode | None = None) -> mx.array:
        """Compute `hidden` by MLX, with `native` between a prompt's products; leaves the cache's length."""
        if self.fused_decoder and ids.size <= MAX_FUSED_ROWS and not cache.quantized:
            x = self._read_fused(ids, cache)[None]  # [1, T, hidden]
        else:
            native = native if native and native.is_used and ids.size > MAX_FUSED_ROWS else None
            x = self.embed(ids[None])  # [1, T, hidden]
            for number, (layer, memory) in enumerate(zip(self.layers, cache.layers, strict=True)):
                x = native.read_prompt(number, layer, x, memory) if native else layer(x, memory)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: mx.array) -> mx.array:
        """Map hidden states [1, T, hidden] to logits [T, V] in float32."""
        if hidden is self._latest[0]:
            logits = self._latest[1]
        else:
            logits = self.native.logits(hidden) if self.native else None
        logits = self.head(hidden)[0].astype(mx.float32) if logits is None else logits
        if not self._proven:
            self.check_finite(logits)
            self._proven = True
        return logits

    def check_finite(self, outputs: mx.array) -> None:
        """Raise WeightsError if hidden states or logits are not finite, as damaged weights make them."""
        if not mx.isfinite(outputs).all():
            raise WeightsError(self.explain_failure())

    def forward_speculative(self, ids: mx.array, cache: Cache) -> mx.array:
        """Do what `hidden` does for a few ids [T], of which `cache.commit` may roll back the last ones.

        `cache.hidden` stays as it is.
        """
        if self.native and self.native.supports(ids.size, cache):
            x = self.native.forward_speculative(ids.tolist(), cache)  # pyright: ignore[reportArgumentType]
        elif self.fused_decoder and ids.size <= MAX_FUSED_ROWS and not cache.quantized:
            x = self.fused_decoder(self.embed(ids), cache, speculative=True)[None]  # [1, T, hidden]
            x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        else:
            x = self.embed(ids[None])  # [1, T, hidden]
            for layer, memory in zip(self.layers, cache.layers, strict=True):
                x = layer.forward_speculative(x, memory)
            x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        self._start(x, cache)
        cache.length += ids.size
        return x

    def mtp_hidden(self, ids: mx.array, hidden: mx.array, cache: KVCache) -> mx.array:
        """Return the draft head's hidden states [1, T, hidden] for ids [T].

        `hidden` [1, T, hidden] holds the hidden state before each id. Raises ValueError for a model without
        a draft head.
        """
        if self.mtp is None:
            raise ValueError("this model has no draft head")
        return self.mtp(self.embed(ids[None]), hidden, cache)

    def new_cache(self, *, quantized: bool = False) -> Cache:
        """Return a cache that has read nothing; `quantized` keeps keys and values at 8 bits."""
        return Cache.empty(self.config, self.policy.activations, quantized=quantized)

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

    def _step_graph(self) -> StepGraph | None:
        """The step of a token as one graph; None where it cannot be."""
        if self.fused_decoder is None or self.gathers:
            return None
        norm = Norm(self.norm, self.config.rms_norm_eps)
        return StepGraph.of(self.fused_decoder.layers, Ends(self.embed.table, norm, self.head.weight))

    @property
    def delta_forms(self) -> str:
        """Names of the delta rule's forms in use, which round differently."""
        forms = {form for layer in self.layers for form in layer_forms(layer)}
        return " ".join(sorted(forms))

    @property
    def step_rows(self) -> int:
        """The most tokens that a step reads fast here; more would go through the slow way of a prompt.

        Only the step in C has such a limit.
        """
        return MAX_ROWS if self.native is not None and self.native.is_used else self.config.vocab_size

    @property
    def step_nbytes(self) -> int:
        """Bytes of weights that are read to decode one token."""
        return self._step_nbytes[self.native is not None and self.native.is_used]

    @property
    def context(self) -> int:
        """The most tokens a conversation may have, with keys and values at full width."""
        longest = self.config.max_position_embeddings
        return longest if self.plan is None else min(longest, self.plan.context)

    def plan_for(self, context: int | None, *, quantized: bool) -> MemoryPlan | None:
        """Plan a conversation of `context` tokens, or as many as fit, with the same `quantized` as its cache.

        Returns None where memory is unlimited. Raises DoesNotFit, UsageError.
        """
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

    def warm_up(self) -> None:
        """Compile the kernels of a prompt and of a decode step, so that no reply waits for them."""
        cache = self.new_cache()
        for length in (2 * MAX_FUSED_ROWS, 1, 1):  # a graph of each kind has a turn
            mx.eval(self.logits(self.hidden([0] * length, cache)[:, -1:]))

    def use_plain_layers(self) -> list[AttentionLayer | DeltaLayer]:
        """Run on the plain layers from now on, so that a caller may replace their parts; return them."""
        plain = [plain_form(layer) for layer in self.layers]
        self.layers, self.fused_decoder, self.native = list[Layer](plain), None, None
        self.graph = None
        if self.mtp is not None:
            self.mtp.layer = plain_form(self.mtp.layer)
        return plain
