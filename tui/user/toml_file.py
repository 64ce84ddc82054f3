"""Small TOML files: read with a limit, and one line of them replaced.

Refuses, in one sentence with the file's name, what is too large, no regular file, or no TOML.
"""

import codecs
import re
from pathlib import Path
from typing import Any

from ...core.errors import UsageError
from ...core.machine.files import parse_toml, write_whole

MAX_FILE_NBYTES = 64 << 10


def read_toml(path: Path) -> dict[str, Any]:
    """A small TOML file; nothing where there is none. Raises UsageError naming it."""
    data = _bytes_of(path)
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


def _bytes_of(path: Path) -> bytes:
    try:
        if not path.exists():
            return b""
        if not path.is_file():  # a pipe would be waited for
            raise UsageError(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_NBYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_FILE_NBYTES:
        raise UsageError(f"{path} has more than {MAX_FILE_NBYTES >> 10} KiB, which no settings need")
    return data


def replace_line(path: Path, name: str, value: str) -> None:
    """Set the top-level key `name` to a text without quotes or escapes; every other line stays.

    Raises UsageError where the file cannot be read or written, or its form does not allow that.
    """
    before = read_toml(path)
    line = f'{name} = "{value}"'
    text = _decode(_bytes_of(path), path)
    changed, count = re.subn(rf"(?m)^{name}[ \t]*=.*$", line, text, count=1)
    text = changed if count else f"{line}\n{text}"
    try:
        same = parse_toml(text) == before | {name: value}
    except ValueError:
        same = False
    if not same:  # the line was within a longer text or in a table
        raise UsageError(f"{path} could not be changed: write {line} at its beginning")
    _replace(path.resolve(), text)


def _replace(path: Path, text: str) -> None:
    try:
        write_whole(path, text, mode=0o600)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
