"""Writes the files beside the weights: config.json with its quantization, copies of tokenizer and templates.

Keeps every field of the source's config that is still true. Refuses links out of the source folder.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX
from ..checkpoint.packed import Geometry
from ..checkpoint.shards import regular_file
from ..errors import ModelError
from ..machine.files import read_bytes
from .source import Source
from .writer import Unit, write_file

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)
VISION_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
MAX_FILE_NBYTES = 256 << 20
QUANTIZATION = ("quantization", "quantization_config")


def write_companions(folder: Path, source: Source, units: Sequence[Unit], default: Geometry) -> list[str]:
    """Write config.json and the copies, and return their names. Raises ModelError and OSError."""
    config = json.dumps(make_config(source.config, units, default), indent=2, ensure_ascii=False)
    write_file(folder / "config.json", config.encode())
    vision = any(unit.name in source.vision for unit in units)
    wanted = (*TEXT_FILES, *VISION_FILES) if vision else TEXT_FILES
    present = [name for name in wanted if (source.folder / name).exists()]
    for name in present:
        path = regular_file(source.folder, source.folder / name)
        write_file(folder / name, read_bytes(path, ModelError, MAX_FILE_NBYTES))
    return ["config.json", *present]


def make_config(source: ModelConfig, units: Sequence[Unit], default: Geometry) -> dict[str, Any]:
    """The source's config with two equal quantization objects, or none if nothing is packed.

    Their top level is `default`; each module packed in another way has an entry.
    """
    config = deepcopy(dict(source.raw))
    text = config.get("text_config", config)
    for name in QUANTIZATION:
        config.pop(name, None)
        text.pop(name, None)
    for part in (config, text):
        if "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = source.tie_word_embeddings
    names = {unit.name for unit in units}
    heads = int(any(name.startswith(MTP_PREFIX) for name in names))
    if text.get("mtp_num_hidden_layers", 0) != heads:
        text["mtp_num_hidden_layers"] = heads
    if "vision_config" in config and not any(name.startswith("vision_tower.") for name in names):
        config["language_model_only"] = True
    packed = {unit.path: unit.geometry for unit in units if unit.geometry is not None}
    if packed:
        entries = {path: _triple(packed[path]) for path in sorted(packed) if packed[path] != default}
        config |= {name: {**_triple(default), **entries} for name in QUANTIZATION}
    return config


def _triple(geometry: Geometry) -> dict[str, Any]:
    return {"group_size": geometry.group_size, "bits": geometry.bits, "mode": geometry.mode}
