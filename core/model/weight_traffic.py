"""The bytes of weights that decoding one token reads.

A token cannot be decoded faster than its weights are read: these bytes over the memory bandwidth are a lower
bound of its time. The context's keys, values and states come on top.
"""

from collections.abc import Mapping

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX
from ..checkpoint.packed import Packed
from ..machine.backend import Policy, mx


def step_nbytes(tensors: Mapping[str, mx.array | Packed], config: ModelConfig, policy: Policy | None) -> int:
    """Sum the bytes of weights read to decode one token; of the experts only the routed ones count.

    Weights count as `policy` keeps them, without one as they are stored.

    `tensors` by canonical name.
    """
    table = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    total = 0.0
    for name, tensor in tensors.items():
        if name.startswith(MTP_PREFIX) or (name in ("embed_tokens", "lm_head") and name != table):
            continue
        share = config.num_experts_per_tok / config.num_experts if ".switch_mlp." in name else 1.0
        total += share * _kept_nbytes(tensor, policy)
    return round(total)


def _kept_nbytes(tensor: mx.array | Packed, policy: Policy | None) -> int:
    if policy is None:
        return tensor.nbytes
    width = policy.activations.size
    if isinstance(tensor, Packed):
        if policy.dense:
            return tensor.scales.size * tensor.group_size * width
        scales = tensor.scales.nbytes if tensor.biases is None else 2 * tensor.scales.size * width
        return tensor.weight.nbytes + scales
    return tensor.size * (width if policy.dense else min(width, tensor.dtype.size))
