"""Finds the weight files of a model folder: the shards of an index or a single file, and a separate MTP head.

The folder was downloaded, so its index is untrusted: a shard must be a plain file name in that folder. A link
may point outside only to the `blobs` of the Hugging Face cache around it. Refuses pickles and GGUF.
"""

import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import WeightsError
from ..machine.files import read_bytes
from ..quoting import printable
from .header import Header, parse_table, read_header

WHOLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MTP_NAMES = ("mtp.safetensors", "mtp/weights.safetensors")
MAX_SHARDS = 1000
MAX_INDEX_NBYTES = 50_000_000
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}\.safetensors")


@dataclass(frozen=True)
class Shards:
    """The weight files of `folder`: `paths` hold the model, `mtp` a separate MTP head.

    `index` says which file each tensor should be in; it is empty where there is none, or a stale one.
    """

    folder: Path
    paths: tuple[Path, ...]
    mtp: Path | None
    index: dict[str, str]
    has_stale_index: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """Every weight file, that of the MTP head last."""
        return self.paths if self.mtp is None else (*self.paths, self.mtp)


def find_shards(folder: Path) -> Shards:
    """The weight files of `folder`, each an existing regular file inside it. Raises WeightsError."""
    index = _read_index(folder)
    here = sorted(path.name for path in folder.glob("model*.safetensors"))
    stale = _is_stale(set(index.values()), here)
    index = {} if stale else index
    names = [WHOLE_NAME] if stale and WHOLE_NAME in here else sorted(set(index.values())) or here
    if not names:
        raise WeightsError(_no_weights_message(folder))
    if len(names) > MAX_SHARDS:
        raise WeightsError(f"{folder} has {len(names)} shards, at most {MAX_SHARDS} can be open at once")
    paths = tuple(_shard_path(folder, name) for name in names)
    return Shards(folder, paths, _mtp_file(folder, names), index, stale)


def _is_stale(indexed: set[str], here: Sequence[str]) -> bool:
    """Whether an index is that of another version of the model, whose files are gone: then the files decide.

    That is so where none of its files is left, or where the whole model is beside what is left of them.
    """
    missing = indexed - set(here)
    whole = WHOLE_NAME in here and WHOLE_NAME not in indexed
    return bool(missing and here) and (whole or missing == indexed)


def read_headers(shards: Shards) -> tuple[Header, ...]:
    """Read and check the header of each of `shards.files`, and check the index against them.

    Raises WeightsError.
    """
    headers = {path: read_header(path) for path in shards.files}
    for tensor, name in shards.index.items():
        if tensor not in headers[shards.folder / name].entries:
            place = f"{shards.folder / INDEX_NAME} places {printable(tensor)} in {name}"
            raise WeightsError(f"{place}, which does not hold it")
    return tuple(headers.values())


def stamp_files(folder: Path, paths: Iterable[Path]) -> str:
    """One line for each of `paths`: its name in `folder`, its size, its modification time in nanoseconds.

    The text changes whenever one of the files does. Raises WeightsError.
    """
    try:
        stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in paths]
    except OSError as error:
        raise WeightsError(f"cannot read {error.filename}: {error.strerror}") from error
    return "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in stats)


def regular_file(folder: Path, path: Path) -> Path:
    """`path`, if it is a regular file inside `folder` or its cache. Raises WeightsError otherwise."""
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise WeightsError(f"the weight file {path} is missing or a broken link") from error
    if not any(real.is_relative_to(root) for root in _allowed_roots(home)):
        raise WeightsError(f"the weight file {path} is a link to {real}, outside its model folder")
    if not stat.S_ISREG(mode):
        raise WeightsError(f"the weight file {path} is not a regular file")
    return path


def _allowed_roots(home: Path) -> Iterable[Path]:
    """`home`, and where the Hugging Face cache around `models--x/snapshots/<revision>` keeps its files.

    Those are the blobs of the model, and those that huggingface_hub 2 shares between models.
    """
    yield home
    if home.parent.name == "snapshots":
        yield home.parents[1] / "blobs"
        yield home.parents[2] / "blobs"


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    if not path.is_symlink() and not path.exists():
        return {}
    text = read_bytes(regular_file(folder, path), WeightsError, MAX_INDEX_NBYTES)
    index = parse_table(text, str(path)).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise WeightsError(f"{path}: weight_map is not an object that names a shard for each tensor")
    for tensor, name in index.items():
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise WeightsError(
                f"{path}: {printable(tensor)} should be in {printable(str(name))}, wanted the plain name of "
                "a .safetensors file in the same folder"
            )
    return index


def _shard_path(folder: Path, name: str) -> Path:
    if not PLAIN_NAME.fullmatch(name):
        raise WeightsError(f"{folder} has a weight file with the odd name {printable(name)}")
    return regular_file(folder, folder / name)


def _mtp_file(folder: Path, names: list[str]) -> Path | None:
    for name in MTP_NAMES:
        if name not in names and (folder / name).exists():
            return regular_file(folder, folder / name)
    return None


def _no_weights_message(folder: Path) -> str:
    suffixes = {path.suffix for path in folder.glob("*")}
    if ".gguf" in suffixes:
        return f"{folder} holds a GGUF file and no .safetensors: get the original or an MLX checkpoint"
    if suffixes & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}:
        return f"{folder} holds pickled weights, which can run code when read, and no .safetensors"
    return f"{folder} has no weights: no {INDEX_NAME} and no model.safetensors"
