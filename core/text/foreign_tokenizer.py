"""Encodes and decodes by a tokenizer.json whose rules may take any time: a program for `limited_process`.

A request names the file, and holds a text to encode, ids to decode, or neither. Recognises no added token in
a text. Imports nothing of qchat, so that it starts fast.
"""

import codecs
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids or the text for one request, or the error."""
    path = Path(request["path"])
    try:
        library = _load(path, path.stat().st_mtime_ns)
        if "text" in request:
            return {"ids": library.encode(request["text"], add_special_tokens=False).ids}
        return {"text": library.decode(request.get("ids", []), skip_special_tokens=False)}
    except MemoryError:
        raise
    except BaseException as problem:  # the library's panics derive from it
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        return {"error": f": {' '.join(str(problem)[:2000].split())[:300]}"}


@functools.lru_cache(maxsize=2)
def _load(path: Path, changed: int) -> Tokenizer:  # noqa: ARG001
    library = Tokenizer.from_buffer(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    library.no_truncation()
    library.no_padding()
    added = list(library.get_added_tokens_decoder().values())
    for token in added:
        token.special = True
    library.add_special_tokens(added)
    library.encode_special_tokens = True
    return library
