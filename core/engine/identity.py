"""Identity of a loaded model: hashes of its config, template and tokenizer, and a digest of its weight files.

Stored ids are valid for equal tokenizers and templates; a saved state needs all parts to be equal.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.shards import find_shards, stamp_files
from ..errors import ModelError
from ..hub.names import model_name
from ..storage.records import ModelIdentity


def read_identity(folder: Path, config: Mapping[str, Any], template: str) -> ModelIdentity:
    """Read the identity of the model in `folder`; `config` is its config.json, `template` its source text.

    Weight files count by name, size and modification time. Raises ModelError where files have disappeared.
    """
    try:
        with (folder / "tokenizer.json").open("rb") as file:
            tokenizer = hashlib.file_digest(file, "sha256").hexdigest()
        stamps = stamp_files(folder, find_shards(folder).paths)
    except OSError as error:
        raise ModelError(f"{folder} can no longer be read: {error}") from error
    return ModelIdentity(
        name=model_name(folder.resolve()),
        folder=str(folder.resolve()),
        config_hash=_hash(json.dumps(config, sort_keys=True)),
        weights=_hash(stamps),
        template_hash=_hash(template),
        tokenizer_hash=tokenizer,
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
