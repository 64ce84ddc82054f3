"""The memory that a model needs, and the context and prefill chunk that fit in this machine's.

Counts from `config.json` and the weight files' headers; loads nothing. Refuses a model that cannot fit, with
numbers, and says what would fit.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import Weights, load_weights
from ..errors import DoesNotFit, UsageError
from ..hub.names import model_name
from ..machine.backend import Policy, choose_policy, on_gpu
from ..machine.device import device_free_nbytes
from . import native_decode, step_graph
from .cache import QUANTIZED_BITS, QUANTIZED_GROUP
from .memory_figures import OVERHEAD_NBYTES, MemoryPlan

GB = 10**9
# prompt tokens read at once, largest first; small chunks cancel sooner, large ones read faster
CHUNKS = (2048, 1024, 512, 256, 128)
# a model must fit with enough context for one short question
LEAST_CONTEXT = 512


@dataclass(frozen=True)
class Need:
    """Bytes that a model needs: always, per token of context, and while reading a prompt."""

    weights_nbytes: int
    state_nbytes: int
    kv_nbytes_per_token: int
    row_nbytes: int
    score_nbytes: int

    def transient_nbytes(self, chunk: int, context: int) -> int:
        """Bytes needed to read `chunk` tokens: a layer's activations, and attention scores in memory."""
        return chunk * (self.row_nbytes + self.score_nbytes * context)

    def total_nbytes(self, chunk: int, context: int) -> int:
        """Bytes of everything but snapshots, for a conversation of `context` tokens."""
        kept = self.weights_nbytes + self.state_nbytes + context * self.kv_nbytes_per_token
        return OVERHEAD_NBYTES + kept + self.transient_nbytes(chunk, context)


def plan_memory(
    config: ModelConfig,
    weights: Weights,
    policy: Policy,
    *,
    name: str,
    context: int | None = None,
    kv_bits: int | None = None,
    sharers: int = 1,
) -> MemoryPlan:
    """Plan this model's memory on this machine, for `context` tokens or as many as fit.

    `sharers` processes share the free memory equally. Raises UsageError for a bad number, DoesNotFit where
    the weights or the requested context do not fit.
    """
    resident = weights.parameters * policy.activations.size if policy.dense else weights.nbytes
    resident += native_decode.kept_nbytes(weights.tensors, config, policy)
    return fit(
        need_of(config, resident, policy, kv_bits=kv_bits),
        longest=config.max_position_embeddings,
        free_nbytes=device_free_nbytes() // sharers,
        context=context,
        name=name,
    )


def plan_folder(folder: Path, *, context: int | None = None, kv_bits: int | None = None) -> MemoryPlan:
    """Plan the memory of a model folder without loading it. Raises ModelError, too, and its children."""
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config)
    config = weights.settle(config)
    policy = choose_policy(weights.parameters)
    name = model_name(folder.resolve())
    return plan_memory(config, weights, policy, name=name, context=context, kv_bits=kv_bits)


def need_of(config: ModelConfig, weights: int, policy: Policy, *, kv_bits: int | None = None) -> Need:
    """The needs of a model of this config whose weights take `weights` bytes. Raises UsageError."""
    if kv_bits not in (None, QUANTIZED_BITS):
        raise UsageError(f"keys and values are kept at full width or {QUANTIZED_BITS} bits, not at {kv_bits}")
    size = policy.activations.size
    attending = config.layer_types.count("full_attention")
    deltas = len(config.layer_types) - attending
    kv_item = size if kv_bits is None else kv_bits / 8 + 2 * size / QUANTIZED_GROUP
    state = 4 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    conv = size * (config.linear_conv_kernel_dim - 1) * config.conv_dim
    heads = (config.num_attention_heads, config.num_key_value_heads)
    inner = config.intermediate_size or (
        config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    )
    graphs = kv_bits is None and policy.sum is None and step_graph.wanted()
    homes = 2 if graphs else 0  # beside the states of the cache
    # the widest point of a layer: queries with gates, keys, values; or the delta net's; or gate and up
    delta = 2 * config.conv_dim + 2 * config.value_dim
    attention = (2 * heads[0] + 2 * heads[1]) * config.head_dim
    row = size * (3 * config.hidden_size + max(attention, 2 * delta, 3 * inner))
    return Need(
        weights_nbytes=weights,
        state_nbytes=(1 + homes) * deltas * (state + conv),
        kv_nbytes_per_token=int(attending * 2 * heads[1] * config.head_dim * kv_item),
        row_nbytes=row,
        score_nbytes=0 if _scores_are_fused(config) else size * heads[0],
    )


def _scores_are_fused(config: ModelConfig) -> bool:
    """Whether attention keeps no scores in memory: MLX's fused prefill takes head dims up to 128."""
    return on_gpu() and config.head_dim <= 128


def fit(need: Need, *, longest: int, free_nbytes: int, context: int | None, name: str) -> MemoryPlan:
    """Plan within `free_nbytes` (0: unknown). Raises DoesNotFit, and UsageError for a bad `context`."""
    if context is not None and context < 1:
        raise UsageError(f"the context is {context:,} tokens, wanted 1 or more")
    wanted = min(context or longest, longest)
    if not free_nbytes:
        return _plan(need, CHUNKS[2], wanted, 0)
    least = min(LEAST_CONTEXT, wanted)
    if need.total_nbytes(CHUNKS[-1], least) > free_nbytes:
        raise DoesNotFit(
            f"{name} needs {need.total_nbytes(CHUNKS[-1], least) / GB:.1f} GB for {least:,} tokens of "
            f"context, {need.weights_nbytes / GB:.1f} GB of it for weights, and this machine has "
            f"{free_nbytes / GB:.1f} GB: {_suggest(need, least, free_nbytes)}"
        )
    if context is not None and need.total_nbytes(CHUNKS[-1], wanted) > free_nbytes:
        most = _longest(need, CHUNKS[-1], longest, free_nbytes)
        raise DoesNotFit(
            f"{name} needs {need.total_nbytes(CHUNKS[-1], wanted) / GB:.1f} GB for {wanted:,} tokens of "
            f"context and this machine has {free_nbytes / GB:.1f} GB: {most:,} tokens would fit"
        )
    chunk = next((c for c in CHUNKS if need.total_nbytes(c, wanted) <= free_nbytes), CHUNKS[-1])
    most = _longest(need, chunk, wanted, free_nbytes)
    plan = _plan(need, chunk, most, free_nbytes)
    left = free_nbytes - need.total_nbytes(chunk, most)
    return replace(plan, snapshot_nbytes=max(0, min(left, plan.snapshot_budget_nbytes)))


def _plan(need: Need, chunk: int, context: int, free: int) -> MemoryPlan:
    """Return the plan without snapshots."""
    return MemoryPlan(
        context=context,
        chunk=chunk,
        weights_nbytes=need.weights_nbytes,
        state_nbytes=need.state_nbytes,
        kv_nbytes=context * need.kv_nbytes_per_token,
        kv_nbytes_per_token=need.kv_nbytes_per_token,
        transient_nbytes=need.transient_nbytes(chunk, context),
        snapshot_nbytes=0,
        free_nbytes=free,
    )


def _longest(need: Need, chunk: int, wanted: int, free_nbytes: int) -> int:
    """Return the longest context within `free_nbytes`, at most `wanted`."""
    empty = need.total_nbytes(chunk, 0)
    per_token = need.total_nbytes(chunk, 1) - empty
    return max(0, min(wanted, (free_nbytes - empty) // per_token if per_token else wanted))


def _suggest(need: Need, context: int, free_nbytes: int) -> str:
    """Return a clause about the variant of the model that would fit."""
    room = free_nbytes - (need.total_nbytes(CHUNKS[-1], context) - need.weights_nbytes)
    if room <= 0:
        return "no variant of it would fit"
    return f"a variant with weights of {room / GB:.1f} GB would fit"
