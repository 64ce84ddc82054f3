"""A raw random checkpoint as wide as the 9B model: `PYTHONPATH=.dev python -m tests.big_checkpoint FOLDER`.

8 layers, the default, make 8.0 GB; another number may follow. It is written as a stream, in little memory.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.layouts import Spec, body_specs, mtp_specs
from qchat.core.conversion.writer import SHARD_NBYTES, Array, ShardWriter, Unit, split_shards, write_index
from qchat.core.machine.backend import mx
from tests.checkpoints import tiny_config, write_tokenizer

POOL = 1 << 24  # random numbers, which every tensor is cut from at another place
WIDE: dict[str, Any] = {
    "hidden_size": 4096,
    "vocab_size": 248320,
    "intermediate_size": 12288,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


def big_config(layers: int) -> dict[str, Any]:
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * math.ceil(layers / 4)
    return tiny_config(tied=False, **WIDE, num_hidden_layers=layers, layer_types=kinds[:layers])


def raw_unit(name: str, spec: Spec) -> Unit:
    """The canonical tensor `name` as Hugging Face stores it."""
    top = name.startswith(("mtp.", "lm_head"))
    path = name if top else f"model.language_model.{name}"
    shape = (spec.shape[0], 1, spec.shape[1]) if spec.kind == "conv" else spec.shape
    suffix = "" if spec.kind == "vector" else ".weight"
    return Unit(name, path, None, {"weight": Array(path + suffix, "BF16", shape)})


def write_big_checkpoint(folder: Path, layers: int = 8) -> int:
    """Write the folder; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    raw = big_config(layers)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    write_tokenizer(folder)
    config = ModelConfig.load(folder)
    specs = body_specs(config) | mtp_specs(config)
    shards = split_shards((raw_unit(name, spec) for name, spec in specs.items()), SHARD_NBYTES)
    draw = np.random.default_rng(0)
    pool = draw.standard_normal(POOL, dtype=np.float32)
    for shard in shards:
        with ShardWriter(folder, shard) as file:
            for unit in shard.units:
                fill(file, unit, specs[unit.name], pool, draw)
    write_index(folder, shards)
    return sum(unit.nbytes for shard in shards for unit in shard.units)


def fill(file: ShardWriter, unit: Unit, spec: Spec, pool: np.ndarray, draw: np.random.Generator) -> None:
    """Write one tensor, a few rows at a time, of a trained model's scale."""
    array = unit.arrays["weight"]
    scale, centre = (0.1, 1.0 if spec.kind == "plain_norm" else 0.0)
    if spec.kind == "matrix":
        scale = array.shape[-1] ** -0.5
    row = array.shape[1:]
    step = max(1, POOL // 4 // math.prod(row))
    for begin in range(0, array.shape[0], step):
        rows = min(step, array.shape[0] - begin)
        start = int(draw.integers(POOL // 2))
        values = mx.array(pool[start : start + rows * math.prod(row)]).reshape(rows, *row)
        file.write(array, (values * scale + centre).astype(mx.bfloat16), begin)


if __name__ == "__main__":
    target, *rest = sys.argv[1:]
    nbytes = write_big_checkpoint(Path(target), *map(int, rest))
    print(f"{target}: {nbytes / 10**9:.2f} GB")
