"""The canonical name and shape of every tensor of a model: the table that checkpoints are checked against.

Canonical names have no prefix and no `.weight`. Stored names are those of Hugging Face or of a converter,
with or without `language_model.`.
"""

from dataclasses import dataclass
from typing import Literal

from .config import ModelConfig

Kind = Literal["matrix", "norm", "plain_norm", "vector", "conv"]
Part = Literal["weight", "scales", "biases", "scale_inv"]
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
VISION_PREFIXES = ("model.visual.", "visual.", "vision_tower.", "model.vision_tower.")
DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
PART_SUFFIXES: dict[str, Part] = {
    ".weight_scale_inv": "scale_inv",
    "_scale_inv": "scale_inv",  # of stacked experts, which have no `.weight`
    ".weight": "weight",
    ".scales": "scales",
    ".biases": "biases",
}
MTP_PREFIX = "mtp."


@dataclass(frozen=True)
class Spec:
    """The kind and shape of one canonical tensor; only a `matrix` [..., N, K] may be packed.

    `norm` is zero-centred in raw checkpoints (applied as 1 + w), `plain_norm` is not; `conv` is [C, K].
    """

    kind: Kind
    shape: tuple[int, ...]


def module_name(stored: str) -> str:
    """`stored` without the prefix of its checkpoint family."""
    for prefix in PREFIXES:
        if stored.startswith(prefix):
            return stored.removeprefix(prefix)
    return stored


def split_part(stored: str, *, mtp_file: bool = False) -> tuple[str, Part]:
    """The canonical module that a stored name belongs to, and the part of it that is stored there.

    Names in a separate file of the MTP head may lack `mtp.`.
    """
    name = module_name(stored)
    if mtp_file and not name.startswith(MTP_PREFIX):
        name = MTP_PREFIX + name
    for suffix, part in PART_SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), part
    return name, "weight"


def is_vision(stored: str) -> bool:
    return stored.startswith(VISION_PREFIXES)


def is_derived(stored: str) -> bool:
    """Whether `stored` names a buffer that old exporters wrote and every runtime computes itself."""
    return stored.endswith(DERIVED_SUFFIXES)


def body_specs(config: ModelConfig) -> dict[str, Spec]:
    """Every tensor of the model except the MTP head; no `lm_head` if the embeddings are tied."""
    width = config.hidden_size
    specs = {"embed_tokens": Spec("matrix", (config.vocab_size, width)), "norm": Spec("norm", (width,))}
    if not config.tie_word_embeddings:
        specs["lm_head"] = Spec("matrix", (config.vocab_size, width))
    for layer, kind in enumerate(config.layer_types):
        specs |= _layer(config, f"layers.{layer}.", kind)
    return specs


def mtp_specs(config: ModelConfig) -> dict[str, Spec]:
    """Every tensor of the MTP head, whose single layer is an attention layer."""
    width = config.hidden_size
    return {
        "mtp.fc": Spec("matrix", (width, 2 * width)),
        "mtp.pre_fc_norm_embedding": Spec("norm", (width,)),
        "mtp.pre_fc_norm_hidden": Spec("norm", (width,)),
        "mtp.norm": Spec("norm", (width,)),
        **_layer(config, "mtp.layers.0.", "full_attention"),
    }


def _layer(config: ModelConfig, prefix: str, kind: str) -> dict[str, Spec]:
    mixer = _attention(config) if kind == "full_attention" else _delta_net(config)
    norm = Spec("norm", (config.hidden_size,))
    names = {"input_layernorm": norm, "post_attention_layernorm": norm, **mixer, **_mlp(config)}
    return {prefix + name: spec for name, spec in names.items()}


def _attention(config: ModelConfig) -> dict[str, Spec]:
    width, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "self_attn.q_proj": Spec("matrix", (2 * queries, width)),  # each head's query, then its output gate
        "self_attn.k_proj": Spec("matrix", (keys, width)),
        "self_attn.v_proj": Spec("matrix", (keys, width)),
        "self_attn.o_proj": Spec("matrix", (width, queries)),
        "self_attn.q_norm": Spec("norm", (head,)),
        "self_attn.k_norm": Spec("norm", (head,)),
    }


def _delta_net(config: ModelConfig) -> dict[str, Spec]:
    width, heads = config.hidden_size, config.linear_num_value_heads
    return {
        "linear_attn.in_proj_qkv": Spec("matrix", (config.conv_dim, width)),
        "linear_attn.in_proj_z": Spec("matrix", (config.value_dim, width)),
        "linear_attn.in_proj_a": Spec("matrix", (heads, width)),
        "linear_attn.in_proj_b": Spec("matrix", (heads, width)),
        "linear_attn.out_proj": Spec("matrix", (width, config.value_dim)),
        "linear_attn.conv1d": Spec("conv", (config.conv_dim, config.linear_conv_kernel_dim)),
        "linear_attn.norm": Spec("plain_norm", (config.linear_value_head_dim,)),
        "linear_attn.A_log": Spec("vector", (heads,)),
        "linear_attn.dt_bias": Spec("vector", (heads,)),
    }


def _mlp(config: ModelConfig) -> dict[str, Spec]:
    width = config.hidden_size
    if not config.is_moe:
        return _swiglu("mlp", (), config.intermediate_size, width)
    experts = config.num_experts
    return {
        "mlp.gate": Spec("matrix", (experts, width)),
        "mlp.shared_expert_gate": Spec("matrix", (1, width)),
        **_swiglu("mlp.switch_mlp", (experts,), config.moe_intermediate_size, width),
        **_swiglu("mlp.shared_expert", (), config.shared_expert_intermediate_size, width),
    }


def _swiglu(prefix: str, stack: tuple[int, ...], inner: int, width: int) -> dict[str, Spec]:
    return {
        f"{prefix}.gate_proj": Spec("matrix", (*stack, inner, width)),
        f"{prefix}.up_proj": Spec("matrix", (*stack, inner, width)),
        f"{prefix}.down_proj": Spec("matrix", (*stack, width, inner)),
    }
