"""Tiny random model folders with a vision tower, and pictures to show them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.vision import VisionConfig, vision_specs
from qchat.core.machine.backend import mx
from qchat.core.vision.picture import encode_png
from tests.checkpoints import BYTE_TOKENS, OPENER_TEMPLATE, Tensors, raw_tensors, tiny_config, write_folder

VISION: dict[str, Any] = {
    "model_type": "qwen3_5",
    "depth": 2,
    "hidden_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 48,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [],
}
# of 8 x 8 pixels: 4 to 60 tokens a picture
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 256, "longest_edge": 3840},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.2],
}
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = (
    """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for part in message.content %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
"""
    + OPENER_TEMPLATE
)
PAD = BYTE_TOKENS + 9 + VISION_TOKENS.index("<|image_pad|>")


def seeing_config(vision: Mapping[str, Any] | None = None, **shape: Any) -> dict[str, Any]:
    """The config of a tiny model with a tower; `vision` replaces single fields of it."""
    config = tiny_config(**shape)
    tower = {**VISION, "out_hidden_size": config["text_config"]["hidden_size"], **(vision or {})}
    return {**config, "vision_config": tower, "image_token_id": PAD, "video_token_id": PAD + 1}


def tower_tensors(config: Mapping[str, Any], *, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> Tensors:
    """Random tensors of the tower under Hugging Face's names."""
    tower = VisionConfig.of(ModelConfig.parse(dict(config)))
    assert tower is not None
    draw, tensors = np.random.default_rng([seed, 7]), {}
    for name, shape in vision_specs(tower).items():
        if len(shape) == 5:  # patches are stored channels first
            shape = (shape[0], shape[4], *shape[1:4])
        values = draw.normal(0, 1 / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 30), shape)
        if "norm" in name and name.endswith("weight"):
            values += 1
        if name == "pos_embed.weight":
            values = draw.normal(0, 1, shape)
        tensors[f"model.visual.{name}"] = mx.array(values.astype(np.float32)).astype(dtype)
    return tensors


def write_seeing(
    folder: Path, vision: Mapping[str, Any] | None = None, *, seed: int = 0, **shape: Any
) -> dict[str, Any]:
    """Write a whole raw model folder with a tower. Returns the config."""
    config = seeing_config(vision, **shape)
    write_folder(folder, config, raw_tensors(config, seed=seed) | tower_tensors(config, seed=seed))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in VISION_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return config


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coloured blobs."""
    draw = np.random.default_rng([seed, width, height])
    small = draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def png(width: int, height: int, seed: int = 0) -> bytes:
    """The same as a PNG file."""
    return encode_png(noise(width, height, seed))
