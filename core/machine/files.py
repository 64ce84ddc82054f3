"""Files read whole and bounded (bytes, text, JSON, TOML), written whole or not at all; users' folders.

Reading refuses what is not a regular file (a pipe would hang, a device has no end), what is larger than its
limit, and pointers that Git LFS left in the place of a file. Refuses JSON with NaN, infinity, numbers that no
float holds, or nesting deeper than Python can follow, and TOML with keys that parse in quadratic time.
"""

import codecs
import fcntl
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..quoting import printable, shorten

MAX_JSON_NBYTES = 16 << 20  # parsed values take up to 25 times the room of their text
MAX_JSON_VALUES = 8_000_000
MAX_DIGITS = 308  # of an integer that a float can hold
MAX_KEY_DOTS = 32
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TOML_TEXT = re.compile(
    r'"""(?:\\.|[^\\])*?"""|' r"'''.*?'''|" r'"(?:\\.|[^"\\\n])*"|' r"'[^'\n]*'|#[^\n]*", re.DOTALL
)


def read_bytes(path: Path, error: type[Exception], max_nbytes: int) -> bytes:
    """Return the content of the regular file `path`.

    Raises `error` where it is none, exceeds `max_nbytes`, or is a pointer of Git LFS.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(max_nbytes + 1)
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from problem
    refuse_lfs_pointer(path, data, error)
    if len(data) > max_nbytes:
        raise error(f"{path} is larger than the {max_nbytes:,} bytes that such a file may have")
    return data


def refuse_lfs_pointer(path: Path, data: bytes, error: type[Exception]) -> None:
    """Raise `error` if `data`, the beginning of the file `path`, is a pointer of Git LFS."""
    if data.startswith(LFS_POINTER):
        raise error(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, "
            "or download the model again"
        )


def read_text(path: Path, error: type[Exception], max_nbytes: int) -> str:
    """Return the UTF-8 text of `path`, without a byte order mark.

    Raises `error` as `read_bytes` does, and for bytes that are not UTF-8.
    """
    return decode_text(read_bytes(path, error, max_nbytes), str(path), error)


def decode_text(data: bytes, where: str, error: type[Exception]) -> str:
    """Return UTF-8 `data` as text, without a byte order mark. Raises `error` naming `where`."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8 text: {problem.reason} at byte {problem.start:,}") from problem


def read_json(path: Path, error: type[Exception], max_nbytes: int = MAX_JSON_NBYTES) -> dict[str, Any]:
    """Return the JSON object in `path`; raises `error` with one sentence that names the file."""
    return parse_json(read_text(path, error, max_nbytes), str(path), error)


def parse_json(text: str, where: str, error: type[Exception], *, any_integer: bool = False) -> dict[str, Any]:
    """Return the JSON object in `text`; raises `error` with one sentence that names `where`.

    With `any_integer` the caller checks integers that no float holds.
    """
    try:
        value = parse_json_value(text, any_integer=any_integer)
    except ValueError as problem:
        raise error(f"{where} is not valid JSON: {printable(str(problem))}") from problem
    if not isinstance(value, dict):
        raise error(f"{where} is a JSON {type(value).__name__}, wanted an object")
    return value


def parse_json_value(text: str, *, any_integer: bool = False) -> Any:
    """Return the JSON value in `text`; raises ValueError for anything that this module refuses."""
    import json  # the command line starts without it, and asks for paths here

    if sum(text.count(mark) for mark in "[{,") > MAX_JSON_VALUES:
        raise ValueError(f"it holds more than {MAX_JSON_VALUES:,} values")
    try:
        parse_int = int if any_integer else _parse_integer
        return json.loads(text, parse_constant=_refuse, parse_float=_parse_float, parse_int=parse_int)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number that JSON knows")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {shorten(digits, 40)} is out of range")
    return value


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"the number {shorten(digits, 40)} is out of range")
    return int(digits)


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table in `text`; raises ValueError for anything that this module refuses."""
    import tomllib  # a hundredth of a second, spent where there is something to read

    for line in TOML_TEXT.sub("", text).split("\n"):
        if any(part.count(".") > MAX_KEY_DOTS for part in re.split(r"[,=\[\]{}]", line)):
            raise ValueError(f"it has a key of more than {MAX_KEY_DOTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it nests deeper than any such file needs to") from None


def file_nbytes(path: Path) -> int:
    """Return the size of a file, 0 if it does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def cache_path(name: str) -> Path | None:
    """Return the path `name` in qchat's cache folder; None where there is no home folder."""
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    return None if folder is None else folder / name


def user_folder(variable: str, default: str, env: Mapping[str, str] | None = None) -> Path | None:
    """Return qchat's folder below the XDG base folder that `variable` names, else below `default` at home.

    None where there is no home folder. Not made here.
    """
    base = Path((os.environ if env is None else env).get(variable, ""))
    try:
        # the XDG specification says to ignore relative paths
        return (base if base.is_absolute() else Path.home() / default) / "qchat"
    except RuntimeError:
        return None


def write_whole(
    path: Path, data: bytes | str, *, mode: int = 0o666, sync: bool = False, suffix: str | None = None
) -> None:
    """Write bytes, or text as UTF-8, to `path` in one step; the options are those of `whole_file`.

    Raises OSError.
    """
    with whole_file(path, mode=mode, sync=sync, suffix=suffix) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def whole_file(
    path: Path, *, mode: int = 0o666, sync: bool = False, suffix: str | None = None
) -> Iterator[Path]:
    """Yield an empty temporary file, which replaces `path` once the block ends without an error.

    Whoever reads `path` sees the old file or the new one, never a part; of several writers the last one wins.
    After an error the old file is still there and the temporary one is not. A link at `path` is replaced, not
    followed. `mode` is the new file's, less the umask; `sync` has its bytes on the disk before the old file
    goes. The temporary name ends in `suffix`, by default in that of `path`. Raises OSError.
    """
    temporary = unused_name(path, suffix)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lock_folder(folder: Path, in_use: str, error: type[Exception]) -> int:
    """Make `folder` if it does not exist, and lock it for this process; closing the descriptor unlocks it.

    Raises `error`: for a place where none can be made, and with the sentence `in_use` if another process has
    the lock, or has replaced the folder meanwhile.
    """
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as problem:
        raise error(f"cannot make the folder {folder}: {problem.strerror}") from problem
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not folder.exists() or not os.path.samestat(os.fstat(lock), folder.stat())
    except OSError:
        taken = True
    if taken:
        os.close(lock)
        raise error(in_use)
    return lock


def unused_name(path: Path, suffix: str | None = None) -> Path:
    """A hidden name beside `path` that no other process or thread takes."""
    ending = path.suffix if suffix is None else suffix
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{ending}")
