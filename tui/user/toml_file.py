"""Small TOML files: read with a size limit, edited with their comments and order kept, written whole.

Refuses, in one sentence with the file's name, what is too large, not a regular file, or not TOML.
"""

import codecs
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

from ...core.errors import UsageError
from ...core.machine.files import parse_toml, write_whole

MAX_FILE_NBYTES = 64 << 10


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a small TOML file; empty if there is none. Raises UsageError that names it."""
    data = _read_bytes(path)
    if not data:
        return {}
    text = _decode(data, path)
    try:
        return parse_toml(text)
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from error


def edit_toml(path: Path, change: Callable[[MutableMapping[str, Any]], Any]) -> None:
    """Apply `change` to a TOML file's table and write the file; comments, order and a link at `path` stay.

    Raises UsageError where the file cannot be read or written; it is then unchanged.
    """
    expected = read_toml(path)
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(_decode(_read_bytes(path), path))
        change(document)
        text = tomlkit.dumps(document)
        change(expected)
        same = parse_toml(text) == expected
    except (TOMLKitError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} could not be changed: {error}; edit it by hand") from error
    if not same:  # the file's form is one that the editing library damages
        raise UsageError(f"{path} could not be changed without damage to its other lines; edit it by hand")
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file that only its owner may read, in one step, through a link at `path`. Raises UsageError."""
    try:
        write_whole(path.resolve(), text, mode=0o600)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.exists():
            return b""
        if not path.is_file():  # reading a pipe would block
            raise UsageError(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_NBYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_FILE_NBYTES:
        raise UsageError(f"{path} has more than {MAX_FILE_NBYTES >> 10} KiB, which no settings need")
    return data
