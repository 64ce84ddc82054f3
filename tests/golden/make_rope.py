"""Rotary frequencies and attention factors by Hugging Face transformers, for `rope.json` and live tests.

`PYTHONPATH=.dev:. python tests/golden/make_rope.py` writes the file: for each variant of the config's fields
what `Qwen3_5TextRotaryEmbedding` computes.
"""

import json
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("rope.json")
SIZES = {"head_dim": 256, "hidden_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
CARD = {"rope_type": "yarn", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25, "factor": 4.0}
LENGTH = {"original_max_position_embeddings": 262144}
BETAS = ({}, {"beta_fast": 48, "beta_slow": 2.5}, {"beta_fast": 4, "beta_slow": 4}, {"beta_fast": 0})
SCALES = (
    {},
    {"attention_factor": 1.5},
    {"mscale": 0.7, "mscale_all_dim": 1.1},
    {"mscale": 0.7},
    {"mscale": 0, "mscale_all_dim": 1.0},
)
TRUNCATES = ({}, {"truncate": False}, {"truncate": None})
MROPE = {"mrope_interleaved": True, "mrope_section": [11, 11, 10]}


def variants() -> list[dict[str, Any]]:
    """Fields of the text part of a config, each variant without the sizes."""
    card = {"rope_parameters": CARD | LENGTH | MROPE, "max_position_embeddings": 262144}
    found: list[dict[str, Any]] = [card]
    for betas, scales, truncate in product(BETAS, SCALES, TRUNCATES):
        short = {"original_max_position_embeddings": 4096, "rope_theta": 50_000.0, "factor": 6.5}
        found.append({"rope_parameters": CARD | short | betas | scales | truncate})
    old = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}
    return [
        *found,
        {"rope_scaling": old, "rope_theta": 1e6},
        {"rope_scaling": old},
        {"rope_scaling": old, "rope_parameters": {}, "partial_rotary_factor": 0.5},
        {"rope_scaling": old | {"rope_type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": 3}, "rope_theta": 5e5},
        {"rope_parameters": CARD, "max_position_embeddings": 65536},
        {"rope_parameters": CARD | LENGTH, "original_max_position_embeddings": 16384},
        {"rope_parameters": CARD | LENGTH | {"factor": None}, "max_position_embeddings": 1_048_576},
        {"rope_parameters": CARD | LENGTH | {"factor": 0.5}},
        {"rope_parameters": CARD | LENGTH | {"factor": 1.0}},
        {"rope_parameters": CARD | LENGTH | {"partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}, "rope_theta": 1e7},
        {"rope_parameters": None},
        {"rope_parameters": {}},
        {"rope_theta": 1e7},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e7},
        {"rope_parameters": {"mrope_section": [11, 11, 10]}, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 5e6}, "rope_theta": 1e7},
    ]


def transformers_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """The frequencies in radians per position and the factor on cosines and sines."""
    peer = import_module("transformers")
    peer.utils.logging.set_verbosity_error()
    modeling = import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    config = peer.models.qwen3_5.configuration_qwen3_5.Qwen3_5TextConfig(
        **json.loads(json.dumps(SIZES | fields))
    )
    rope = modeling.Qwen3_5TextRotaryEmbedding(config)
    return {"inv_freq": rope.inv_freq.tolist(), "attention_factor": float(rope.attention_scaling)}


def main() -> None:
    cases = [{"fields": fields, **transformers_rope(fields)} for fields in variants()]
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")
    print(f"{FILE}: {len(cases)} variants, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
