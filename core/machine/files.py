"""Files read whole and bounded (bytes, text, one JSON object), written whole or not at all; users' folders.

Reading refuses what is not a regular file (a pipe would hang, a device has no end), what is larger than its
limit, and JSON that is no object, holds NaN or infinity, or nests deeper than Python can follow.
"""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

MAX_JSON_NBYTES = 16 << 20  # parsed values take up to 25 times the room of their text


def read_bytes(path: Path, error: type[Exception], max_nbytes: int) -> bytes:
    """The content of the regular file `path`; raises `error` where it is none or exceeds `max_nbytes`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(max_nbytes + 1)
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from problem
    if len(data) > max_nbytes:
        raise error(f"{path} is larger than the {max_nbytes:,} bytes that such a file may have")
    return data


def read_text(path: Path, error: type[Exception], max_nbytes: int) -> str:
    """The UTF-8 text of `path`; raises `error` as `read_bytes` does, and for bytes that are no UTF-8."""
    try:
        return read_bytes(path, error, max_nbytes).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text: {problem.reason} at byte {problem.start:,}") from problem


def read_json(path: Path, error: type[Exception], max_nbytes: int = MAX_JSON_NBYTES) -> dict[str, Any]:
    """The JSON object in `path`; raises `error` with one sentence that names the file."""
    return parse_json(read_text(path, error, max_nbytes), str(path), error)


def parse_json(text: str, where: str, error: type[Exception]) -> dict[str, Any]:
    """The JSON object in `text`; raises `error` with one sentence that names `where`."""
    import json  # the command line starts without it, and needs the folders below

    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except ValueError as problem:
        raise error(f"{where} is not valid JSON: {problem}") from problem
    except RecursionError as problem:
        raise error(f"{where} is not usable JSON: it nests too deeply") from problem
    if not isinstance(value, dict):
        raise error(f"{where} is a JSON {type(value).__name__}, wanted an object")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number that JSON knows")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is out of range")
    return value


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


def unused_name(path: Path, suffix: str | None = None) -> Path:
    """A hidden name beside `path` that no other process or thread takes."""
    ending = path.suffix if suffix is None else suffix
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{ending}")
