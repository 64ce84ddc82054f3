"""What a model needs of this machine's memory, and what fits: context, prefill chunk, or nothing at all.

Counts from `config.json` and the weight files' headers; nothing is loaded. Refuses with numbers what cannot
fit, and says what would.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import Weights, load_weights
from ..errors import DoesNotFit, UsageError
from ..machine.backend import Policy, choose_policy, free_memory_nbytes, mx, on_gpu
from ..machine.device import device_memory_nbytes
from . import native_decode
from .cache import QUANTIZED_BITS, QUANTIZED_GROUP

GB = 10**9
# prompt tokens read at once, the largest first; the smallest answers a stop soonest but reads slower
CHUNKS = (2048, 1024, 512, 256, 128)
# of what the weights leave, what snapshots of earlier turns may take
SNAPSHOT_SHARE = 0.25
# the process itself, the tokenizer, compiled kernels
OVERHEAD_NBYTES = 300 << 20
# a model is refused where not even one short question fits
LEAST_CONTEXT = 512


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes in memory: for good, per token of context, and while reading a prompt."""

    weights_nbytes: int
    state_nbytes: int
    kv_nbytes_per_token: int
    row_nbytes: int
    score_nbytes: int

    def transient_nbytes(self, chunk: int, context: int) -> int:
        """While `chunk` tokens are read: a layer's activations, and scores that attention writes out."""
        return chunk * (self.row_nbytes + self.score_nbytes * context)

    def total_nbytes(self, chunk: int, context: int) -> int:
        """Everything but snapshots, for a conversation of `context` tokens."""
        kept = self.weights_nbytes + self.state_nbytes + context * self.kv_nbytes_per_token
        return OVERHEAD_NBYTES + kept + self.transient_nbytes(chunk, context)


@dataclass(frozen=True)
class MemoryPlan:
    """What a model is given: `context` tokens at most, prompts read by `chunk`; all else in bytes.

    `free_nbytes` is what the machine has to give, 0 where it does not tell: then nothing is limited.
    """

    context: int
    chunk: int
    weights_nbytes: int
    state_nbytes: int
    kv_nbytes: int
    kv_nbytes_per_token: int
    transient_nbytes: int
    snapshot_nbytes: int
    free_nbytes: int

    @property
    def total_nbytes(self) -> int:
        """At the longest context, snapshots included."""
        kept = self.weights_nbytes + self.state_nbytes + self.kv_nbytes + self.snapshot_nbytes
        return OVERHEAD_NBYTES + kept + self.transient_nbytes

    @property
    def snapshot_budget_nbytes(self) -> int:
        """A share of what the weights leave; 0 where that is not known. `snapshot_nbytes` of it are there at
        the longest context, too: kept states count the keys and values that they share with the live one."""
        return int(SNAPSHOT_SHARE * max(0, self.free_nbytes - self.weights_nbytes))

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"total_nbytes": self.total_nbytes}


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
    """What running this model takes here, for `context` tokens or as many as fit; `sharers` processes have an
    equal part of the free memory each.

    Raises UsageError for a bad number, DoesNotFit where the weights or the context asked for do not fit.
    """
    resident = weights.parameters * policy.activations.size if policy.dense else weights.nbytes
    resident += native_decode.kept_nbytes(weights.tensors, config, policy)
    return fit(
        need_of(config, resident, policy, kv_bits=kv_bits),
        longest=config.max_position_embeddings,
        free_nbytes=free_nbytes() // sharers,
        context=context,
        name=name,
    )


def plan_folder(folder: Path, *, context: int | None = None, kv_bits: int | None = None) -> MemoryPlan:
    """`plan_memory` for a model folder that is not loaded. Raises ModelError and its children, too."""
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config)
    policy = choose_policy(weights.parameters)
    name = folder.resolve().name
    return plan_memory(config, weights, policy, name=name, context=context, kv_bits=kv_bits)


def free_nbytes() -> int:
    """Bytes that models can still take: of a GPU's memory, or what this machine's kernel would give; 0 where
    neither is known."""
    return max(0, device_memory_nbytes() - mx.get_active_memory()) if on_gpu() else free_memory_nbytes()


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
    # the widest of a layer's moments: queries with gates, keys, values; or the delta net's; or gate and up
    delta = 2 * config.conv_dim + 2 * config.value_dim
    attention = (2 * heads[0] + 2 * heads[1]) * config.head_dim
    row = size * (3 * config.hidden_size + max(attention, 2 * delta, 3 * inner))
    return Need(
        weights_nbytes=weights,
        state_nbytes=deltas * (state + conv),
        kv_nbytes_per_token=int(attending * 2 * heads[1] * config.head_dim * kv_item),
        row_nbytes=row,
        score_nbytes=0 if _scores_are_fused(config) else size * heads[0],
    )


def _scores_are_fused(config: ModelConfig) -> bool:
    """MLX's fused prefill attention serves head dims up to 128; wider ones write out their scores."""
    return on_gpu() and config.head_dim <= 128


def fit(need: Need, *, longest: int, free_nbytes: int, context: int | None, name: str) -> MemoryPlan:
    """The plan within `free_nbytes` (0: not known). Raises DoesNotFit, UsageError for a bad `context`."""
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
            f"{free_nbytes / GB:.1f} GB: {_what_would(need, least, free_nbytes)}"
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
    """Without snapshots."""
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
    """The longest context up to `wanted` within `free_nbytes`."""
    empty = need.total_nbytes(chunk, 0)
    per_token = need.total_nbytes(chunk, 1) - empty
    return max(0, min(wanted, (free_nbytes - empty) // per_token if per_token else wanted))


def _what_would(need: Need, context: int, free_nbytes: int) -> str:
    room = free_nbytes - (need.total_nbytes(CHUNKS[-1], context) - need.weights_nbytes)
    if room <= 0:
        return "nothing of this shape would"
    return f"a variant with weights of {room / GB:.1f} GB would fit"


def plan_table(plan: MemoryPlan) -> str:
    """The plan as lines of text."""
    rows = (
        ("weights", plan.weights_nbytes),
        ("recurrent and convolution states", plan.state_nbytes),
        (f"keys and values of {plan.context:,} tokens", plan.kv_nbytes),
        (f"reading a prompt {plan.chunk:,} tokens at a time", plan.transient_nbytes),
        ("snapshots of earlier turns", plan.snapshot_nbytes),
        ("the process", OVERHEAD_NBYTES),
        ("in all", plan.total_nbytes),
    )
    lines = [f"{name:<44}{nbytes / GB:>9.2f} GB" for name, nbytes in rows]
    free = f"{plan.free_nbytes / GB:>9.2f} GB" if plan.free_nbytes else "not told"
    return "\n".join((*lines, f"{'this machine can give':<44}{free}"))
