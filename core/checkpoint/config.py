"""`config.json` and `generation_config.json` as frozen values, with all bounds checked before any allocation.

Owns the meaning of the fields, which keep Hugging Face's spelling. Reads nested (`text_config`) and flat
files. Refuses unknown model types, sizes beyond any machine, and head counts that do not divide evenly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, ModelError
from ..machine.files import read_json
from ..quoting import quote_value
from .fields import MAX_VOCAB, Fields
from .rope import DEFAULT_SECTIONS, MAX_CONTEXT, read_mrope_section, read_rope

LayerType = Literal["linear_attention", "full_attention"]
# Qwen3.6 calls itself qwen3_5; the architecture of all of them is one
GENERATIONS = ("qwen3_5", "qwen3_8")
MODEL_TYPES = tuple(f"{name}{part}" for name in GENERATIONS for part in ("", "_moe", "_text", "_moe_text"))
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of one model, read from the file `source`; `quantization` is the unchecked object in it.

    `max_position_embeddings` is the longest context, with YaRN the extended one. `rope_frequencies` is empty
    where `rope_theta` alone gives them. `notes` are sentences about fields that had to be interpreted.
    """

    model_type: str
    source: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    layer_types: tuple[LayerType, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    partial_rotary_factor: float
    rope_theta: float
    rms_norm_eps: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    mtp_num_hidden_layers: int = 0
    rope_frequencies: tuple[float, ...] = ()
    rope_attention_factor: float = 1.0
    mrope_section: tuple[int, ...] = DEFAULT_SECTIONS
    eos_token_ids: tuple[int, ...] = ()
    quantization: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def rotary_dim(self) -> int:
        """The number of leading channels of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: queries, keys, values."""
        return 2 * self.key_dim + self.value_dim

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Read `folder`/config.json. Raises ModelError if there is no folder, else ConfigError."""
        try:
            is_file, is_folder = folder.is_file(), folder.is_dir()
        except OSError as error:  # a name that is too long
            raise ModelError(f"{folder} cannot be a model folder: {error.strerror}") from error
        if is_file:
            raise ModelError(f"{folder} is a file: name the model folder that holds its config.json")
        if not is_folder:
            raise ModelError(f"there is no model folder at {folder}")
        path = folder / "config.json"
        if not path.exists():
            raise ConfigError(f"{folder} is not a model folder: it has no config.json")
        return cls.parse(read_json(path, ConfigError), str(path))

    @classmethod
    def parse(cls, raw: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Check `raw` and keep the fields that the runtime needs. Raises ConfigError naming the field."""
        outer = Fields(raw, source)
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            wanted = ", ".join(MODEL_TYPES)
            raise ConfigError(f"{source}: model_type is {quote_value(model_type)}, and qchat runs {wanted}")
        text = outer.section("text_config") if "text_config" in raw else outer
        moe = str(model_type).removesuffix("_text").endswith("_moe")
        layers = text.integer("num_hidden_layers", 1, MAX_LAYERS)
        attention = _attention(text, moe=moe)
        rope, rope_notes = read_rope(text, attention["head_dim"])
        context = text.integer("max_position_embeddings", 1, MAX_CONTEXT, default=262144)
        return cls(
            model_type=str(model_type),
            source=source,
            num_hidden_layers=layers,
            hidden_size=text.integer("hidden_size", 1, MAX_WIDTH),
            vocab_size=text.integer("vocab_size", 1, MAX_VOCAB),
            max_position_embeddings=max(context, rope.context),
            layer_types=_layer_types(text, layers),
            rms_norm_eps=text.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
            tie_word_embeddings=_tie_flag(outer, text),
            mtp_num_hidden_layers=text.integer("mtp_num_hidden_layers", 0, 1, default=0),
            partial_rotary_factor=rope.fraction,
            rope_theta=rope.theta,
            rope_frequencies=rope.frequencies,
            rope_attention_factor=rope.attention_factor,
            mrope_section=read_mrope_section(text),
            eos_token_ids=_end_tokens(outer, text),
            quantization=_quantization(outer, text),
            notes=(*rope_notes, *_tie_notes(outer, text)),
            raw=raw,
            **attention,
            **_delta_net(text),
            **(_experts(text) if moe else _dense_mlp(text)),
        )


def load_generation_config(folder: Path) -> dict[str, Any]:
    """The object in `generation_config.json`; empty if the folder has none. Raises ConfigError."""
    path = folder / "generation_config.json"
    return read_json(path, ConfigError) if path.exists() else {}


def _layer_types(text: Fields, layers: int) -> tuple[LayerType, ...]:
    given = text.values.get("layer_types")
    if given is None:
        every = text.integer("full_attention_interval", 1, MAX_LAYERS, default=4)
        return tuple("full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers))
    known = ("linear_attention", "full_attention")
    if not isinstance(given, list) or len(given) != layers or any(kind not in known for kind in given):
        raise text.refuse("layer_types", f"{layers} entries, each linear_attention or full_attention")
    return tuple(given)


def _end_tokens(outer: Fields, text: Fields) -> tuple[int, ...]:
    """The tokens that end a reply, as both places name them."""
    return tuple(dict.fromkeys(id for fields in (text, outer) for id in fields.token_ids("eos_token_id")))


def _tie_flag(outer: Fields, text: Fields) -> bool:
    """Whether the embeddings are tied: the flag at the top level decides where both are there."""
    return outer.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False))


def _tie_notes(outer: Fields, text: Fields) -> tuple[str, ...]:
    flags = [fields.values.get("tie_word_embeddings") for fields in (outer, text)]
    if None in flags or flags[0] == flags[1]:
        return ()
    return (f"tie_word_embeddings is {str(flags[0]).lower()} and {str(flags[1]).lower()} in text_config",)


def _quantization(outer: Fields, text: Fields) -> Mapping[str, Any] | None:
    for fields in (outer, text):
        for name in ("quantization", "quantization_config"):
            if fields.values.get(name) is not None:
                return fields.section(name).values
    return None


def _attention(text: Fields, *, moe: bool) -> dict[str, Any]:
    heads = text.integer("num_attention_heads", 1, MAX_WIDTH)
    # transformers' defaults
    kv_heads = text.integer("num_key_value_heads", 1, MAX_WIDTH, default=2 if moe else 4)
    if heads % kv_heads:
        raise text.refuse("num_attention_heads", f"a multiple of num_key_value_heads ({kv_heads})")
    if not text.flag("attn_output_gate", True):
        raise text.refuse("attn_output_gate", "true: this architecture gates its attention")
    if text.flag("attention_bias", False):
        raise text.refuse("attention_bias", "false: this architecture has no biases")
    if text.values.get("hidden_act", "silu") != "silu":
        raise text.refuse("hidden_act", "silu")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": text.integer("head_dim", 1, MAX_WIDTH, default=256),
    }


def _delta_net(text: Fields) -> dict[str, Any]:
    key_heads = text.integer("linear_num_key_heads", 1, MAX_WIDTH)
    value_heads = text.integer("linear_num_value_heads", 1, MAX_WIDTH)
    if value_heads % key_heads:
        raise text.refuse("linear_num_value_heads", f"a multiple of linear_num_key_heads ({key_heads})")
    return {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": text.integer("linear_key_head_dim", 1, MAX_WIDTH),
        "linear_value_head_dim": text.integer("linear_value_head_dim", 1, MAX_WIDTH),
        "linear_conv_kernel_dim": text.integer("linear_conv_kernel_dim", 2, 64, default=4),
    }


def _dense_mlp(text: Fields) -> dict[str, Any]:
    return {"intermediate_size": text.integer("intermediate_size", 1, MAX_WIDTH)}


def _experts(text: Fields) -> dict[str, Any]:
    experts = text.integer("num_experts", 1, 1 << 16)
    return {
        "num_experts": experts,
        "num_experts_per_tok": text.integer("num_experts_per_tok", 1, experts),
        "moe_intermediate_size": text.integer("moe_intermediate_size", 1, MAX_WIDTH),
        "shared_expert_intermediate_size": text.integer("shared_expert_intermediate_size", 1, MAX_WIDTH),
        "norm_topk_prob": text.flag("norm_topk_prob", True),
    }
