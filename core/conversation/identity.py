"""What tells one loaded model from another: hashes of config, template and tokenizer, marks of its weights.

Ids mean the same under equal tokenizers and templates; a kept state needs everything to be equal.
"""

import hashlib
import json

from ..checkpoint.shards import find_shards, stamp_files
from ..engine.engine import Engine
from ..errors import ModelError
from ..storage.records import ModelIdentity


def identity_of(engine: Engine) -> ModelIdentity:
    """The identity of `engine`; of the weight files it takes name, size and time alone.

    Raises ModelError where the folder's files are gone by now.
    """
    try:
        with (engine.folder / "tokenizer.json").open("rb") as file:
            tokenizer = hashlib.file_digest(file, "sha256").hexdigest()
        stamps = stamp_files(engine.folder, find_shards(engine.folder).paths)
    except OSError as error:
        raise ModelError(f"{engine.folder} cannot be read any more: {error}") from error
    return ModelIdentity(
        name=engine.name,
        folder=str(engine.folder.resolve()),
        config_hash=_hash(json.dumps(engine.config.raw, sort_keys=True)),
        weights=_hash(stamps),
        template_hash=_hash(engine.template.source),
        tokenizer_hash=tokenizer,
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
