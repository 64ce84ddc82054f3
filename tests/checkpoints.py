"""Tiny random model folders for tests: raw Hugging Face layouts and the converted ones, tokenizer included.

Written from the published format, not from the loader's tables: the two must agree.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qchat.core.machine.backend import mx

Tensors = dict[str, mx.array]
Triple = tuple[int, int, str]
Choose = Callable[[str], Triple | None]
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
BYTE_TOKENS = 256
VOCAB_SIZE = 288
FP8_MAX = 448.0
FP8_BLOCK = 128
ZERO_CENTRED = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")
OPENER_TEMPLATE = """\
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""
CHAT_TEMPLATE = (
    """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
"""
    + OPENER_TEMPLATE
)


def tiny_config(
    *,
    moe: bool = False,
    tied: bool = True,
    flat: bool = False,
    mtp: bool = True,
    hv_ratio: int = 2,
    generation: str = "qwen3_5",
    **sizes: Any,
) -> dict[str, Any]:
    """A `config.json` of 4 layers; `sizes` replaces single fields of its text part."""
    outer = f"{generation}_moe" if moe else generation
    text: dict[str, Any] = {
        "model_type": f"{outer}_text",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 4096,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attn_output_gate": True,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2 * hv_ratio,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "mtp_num_hidden_layers": int(mtp),
        "eos_token_id": BYTE_TOKENS,
        "tie_word_embeddings": tied,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    inner = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    text |= experts | inner if moe else {"intermediate_size": 192}
    text |= sizes
    if flat:
        return text
    return {"model_type": outer, "text_config": text, "tie_word_embeddings": tied}


def raw_tensors(config: Mapping[str, Any], *, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> Tensors:
    """Random tensors under Hugging Face's names, experts stacked, norm weights around zero."""
    text = config.get("text_config", config)
    make = _Random(seed, dtype)
    prefix = "model.language_model." if "text_config" in config else "model."
    width, vocab = text["hidden_size"], text["vocab_size"]
    tensors = {
        f"{prefix}embed_tokens.weight": make.matrix(vocab, width),
        f"{prefix}norm.weight": make.norm(width),
    }
    if not text["tie_word_embeddings"]:
        tensors["lm_head.weight"] = make.matrix(vocab, width)
    for layer, kind in enumerate(text["layer_types"]):
        tensors |= _layer(text, f"{prefix}layers.{layer}.", kind, make)
    return tensors | (_mtp_head(text, make) if text["mtp_num_hidden_layers"] else {})


class _Random:
    """Tensors of a trained model's scale from one seeded stream."""

    def __init__(self, seed: int, dtype: mx.Dtype):
        self._draw = np.random.default_rng(seed)
        self._dtype = dtype

    def _array(self, values: np.ndarray, dtype: mx.Dtype) -> mx.array:
        return mx.array(values.astype(np.float32)).astype(dtype)

    def matrix(self, *shape: int) -> mx.array:
        return self._array(self._draw.normal(0.0, shape[-1] ** -0.5, shape), self._dtype)

    def norm(self, size: int, centre: float = 0.0) -> mx.array:
        return self._array(self._draw.normal(centre, 0.1, size), mx.float32 if centre else self._dtype)

    def conv(self, channels: int, taps: int) -> mx.array:
        return self._array(self._draw.normal(0.0, 0.4, (channels, 1, taps)), self._dtype)

    def decay(self, heads: int) -> mx.array:
        return self._array(np.log(self._draw.uniform(1.0, 16.0, heads)), mx.float32)

    def step(self, heads: int) -> mx.array:
        return self._array(self._draw.normal(-2.0, 1.0, heads), self._dtype)


def _layer(text: Mapping[str, Any], prefix: str, kind: str, make: _Random) -> Tensors:
    width = text["hidden_size"]
    mixer = _attention(text, make) if kind == "full_attention" else _delta_net(text, make)
    block = {
        "input_layernorm.weight": make.norm(width),
        **mixer,
        "post_attention_layernorm.weight": make.norm(width),
        **_mlp(text, make),
    }
    return {prefix + name: tensor for name, tensor in block.items()}


def _attention(text: Mapping[str, Any], make: _Random) -> Tensors:
    width, head = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    return {
        "self_attn.q_proj.weight": make.matrix(2 * queries, width),
        "self_attn.k_proj.weight": make.matrix(keys, width),
        "self_attn.v_proj.weight": make.matrix(keys, width),
        "self_attn.o_proj.weight": make.matrix(width, queries),
        "self_attn.q_norm.weight": make.norm(head),
        "self_attn.k_norm.weight": make.norm(head),
    }


def _delta_net(text: Mapping[str, Any], make: _Random) -> Tensors:
    width, heads = text["hidden_size"], text["linear_num_value_heads"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = heads * text["linear_value_head_dim"]
    return {
        "linear_attn.in_proj_qkv.weight": make.matrix(2 * keys + values, width),
        "linear_attn.in_proj_z.weight": make.matrix(values, width),
        "linear_attn.in_proj_a.weight": make.matrix(heads, width),
        "linear_attn.in_proj_b.weight": make.matrix(heads, width),
        "linear_attn.out_proj.weight": make.matrix(width, values),
        "linear_attn.conv1d.weight": make.conv(2 * keys + values, text["linear_conv_kernel_dim"]),
        "linear_attn.norm.weight": make.norm(text["linear_value_head_dim"], centre=1.0),
        "linear_attn.A_log": make.decay(heads),
        "linear_attn.dt_bias": make.step(heads),
    }


def _mlp(text: Mapping[str, Any], make: _Random) -> Tensors:
    width = text["hidden_size"]
    if "num_experts" not in text:
        return _swiglu("mlp.", text["intermediate_size"], width, make)
    experts, inner = text["num_experts"], text["moe_intermediate_size"]
    return {
        "mlp.gate.weight": make.matrix(experts, width),
        "mlp.experts.gate_up_proj": make.matrix(experts, 2 * inner, width),
        "mlp.experts.down_proj": make.matrix(experts, width, inner),
        "mlp.shared_expert_gate.weight": make.matrix(1, width),
        **_swiglu("mlp.shared_expert.", text["shared_expert_intermediate_size"], width, make),
    }


def _swiglu(prefix: str, inner: int, width: int, make: _Random) -> Tensors:
    return {
        f"{prefix}gate_proj.weight": make.matrix(inner, width),
        f"{prefix}up_proj.weight": make.matrix(inner, width),
        f"{prefix}down_proj.weight": make.matrix(width, inner),
    }


def _mtp_head(text: Mapping[str, Any], make: _Random) -> Tensors:
    width = text["hidden_size"]
    return {
        "mtp.fc.weight": make.matrix(width, 2 * width),
        "mtp.pre_fc_norm_embedding.weight": make.norm(width),
        "mtp.pre_fc_norm_hidden.weight": make.norm(width),
        "mtp.norm.weight": make.norm(width),
        **_layer(text, "mtp.layers.0.", "full_attention", make),
    }


def write_checkpoint(
    folder: Path,
    *,
    experts: Literal["stacked", "each"] = "stacked",
    shards: int = 1,
    seed: int = 0,
    dtype: mx.Dtype = mx.bfloat16,
    **shape: Any,
) -> dict[str, Any]:
    """A whole raw model folder; `shape` goes to `tiny_config`. Returns the config."""
    config = tiny_config(**shape)
    tensors = raw_tensors(config, seed=seed, dtype=dtype)
    write_folder(folder, config, split_experts(tensors) if experts == "each" else tensors, shards)
    return config


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Tensors, shards: int = 1) -> None:
    """Config, tokenizer and tensors as a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder)
    save_shards(folder, tensors, shards)


def save_shards(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """One `model.safetensors`, or several shards in name order with their index."""
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(np.array_split(np.array(names), shards), start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        mx.save_safetensors(
            str(folder / file), {str(name): tensors[str(name)] for name in part}, {"format": "mlx"}
        )
        weight_map |= {str(name): file for name in part}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_tensors(folder: Path) -> Tensors:
    """Every tensor of a folder's shards, read by MLX alone."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        tensors |= loaded
    return tensors


def split_experts(tensors: Tensors) -> Tensors:
    """Stacked experts as one matrix per expert and projection."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        base, mark, projection = name.partition("experts.")
        if not mark or "shared" in base:
            split[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            inner = matrix.shape[0] // 2
            halves = {"gate_proj": matrix[:inner], "up_proj": matrix[inner:]}
            for part, half in (halves if projection == "gate_up_proj" else {projection: matrix}).items():
                split[f"{base}experts.{expert}.{part}.weight"] = half
    return split


def convert_tensors(tensors: Tensors, prefix: str = "language_model.model.") -> Tensors:
    """Raw tensors in the converted layout: names, conv1d transposed, norms shifted, experts as switch_mlp."""
    converted: Tensors = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("model.").removeprefix("language_model.")
        top_level = "language_model." if prefix == "language_model.model." else ""
        outer = top_level if bare.startswith(("lm_head", "mtp.")) else prefix
        if name.endswith("conv1d.weight"):
            tensor = tensor.transpose(0, 2, 1)
        if name.endswith(ZERO_CENTRED) or (name.startswith("mtp.") and "norm" in name):
            tensor = (tensor.astype(mx.float32) + 1).astype(tensor.dtype)
        if bare.endswith("mlp.experts.gate_up_proj"):
            inner = tensor.shape[1] // 2
            base = outer + bare.replace("experts.gate_up_proj", "switch_mlp")
            converted[f"{base}.gate_proj.weight"] = tensor[:, :inner]
            converted[f"{base}.up_proj.weight"] = tensor[:, inner:]
        elif bare.endswith("mlp.experts.down_proj"):
            converted[outer + bare.replace("experts", "switch_mlp") + ".weight"] = tensor
        else:
            converted[outer + bare] = tensor
    return converted


def quantize_checkpoint(
    source: Path,
    target: Path,
    choose: Triple | Choose,
    *,
    prefix: str = "language_model.model.",
    shards: int = 1,
) -> None:
    """Write the raw folder `source` as a converted one, packing what `choose` gives a triple for.

    `choose` is (bits, group_size, mode) for every matrix, or a function of the module's path in `target`.
    """
    config = json.loads((source / "config.json").read_text())
    pick: Choose = choose if callable(choose) else lambda _: choose
    tensors: Tensors = {}
    entries: dict[str, Any] = {}
    for name, tensor in convert_tensors(load_tensors(source), prefix).items():
        path = name.removesuffix(".weight")
        triple = pick(path) if tensor.ndim > 1 and "conv1d" not in name else None
        if triple is None or tensor.shape[-1] % triple[1]:
            tensors[name] = tensor
            continue
        bits, group, mode = triple
        parts = mx.quantize(tensor, group_size=group, bits=bits, mode=mode)
        tensors |= dict(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=False))
        entries[path] = {"bits": bits, "group_size": group, "mode": mode}
    top = next(iter(entries.values()), {"bits": 4, "group_size": 64, "mode": "affine"})
    config["quantization"] = {**top, **{path: entry for path, entry in entries.items() if entry != top}}
    config["quantization_config"] = config["quantization"]
    write_folder(target, config, tensors, shards)


def fp8_checkpoint(source: Path, target: Path) -> None:
    """Write the raw folder `source` with its layers' matrices in E4M3, one float32 scale per 128 x 128."""
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    tensors: Tensors = {}
    codes: set[str] = set()
    for name, tensor in load_tensors(source).items():
        if "layers." not in name or "_proj" not in name or "in_proj_a" in name or "in_proj_b" in name:
            tensors[name] = tensor
            continue
        codes.add(name)
        tensors[name], tensors[f"{name}_scale_inv"] = _fp8(tensor)
    write_folder(target, config, tensors)

    def label(header: dict[str, Any]) -> None:
        for name in codes:
            header[name]["dtype"] = "F8_E4M3"

    edit_header(target / "model.safetensors", label)


def _fp8(matrix: mx.array) -> tuple[mx.array, mx.array]:
    *stack, rows, columns = matrix.shape
    scales = mx.zeros((*stack, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)))
    values = matrix.astype(mx.float32)
    for i in range(0, rows, FP8_BLOCK):
        for j in range(0, columns, FP8_BLOCK):
            block = values[..., i : i + FP8_BLOCK, j : j + FP8_BLOCK]
            scale = mx.abs(block).max(axis=(-2, -1)) / FP8_MAX
            scales[..., i // FP8_BLOCK, j // FP8_BLOCK] = scale
            values[..., i : i + FP8_BLOCK, j : j + FP8_BLOCK] = block / scale[..., None, None]
    return mx.to_fp8(values), scales


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a safetensors file with its JSON header changed in place by `change`, its data untouched."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    write_raw_header(path, json.dumps(header).encode(), content[end:])


def write_raw_header(path: Path, header: bytes, data: bytes = b"") -> None:
    """A safetensors file with exactly this header."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: ids 0 to 255 are the bytes in ByteLevel's order, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in PLAIN_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    end, start = (tokenizer.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": [end, start], "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation))
