"""Models by name: those on this machine and those published, with sizes and whether they fit into memory.

Searches the models folders, the Hugging Face cache and the recently used folders, and adds the built-in
model. Never touches the network or imports MLX; deletes only files of a model that it listed.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX, body_specs, is_vision, split_part
from ..checkpoint.shards import INDEX_NAME, MTP_NAMES, PLAIN_NAME, find_shards, read_headers
from ..errors import ModelError, UsageError
from ..machine.files import file_nbytes, read_json, user_folder, write_whole
from ..quoting import printable
from .cache import (
    CONFIG_NAME,
    SMALL_NAMES,
    Repository,
    cache_folder,
    containing_repository,
    is_id,
    list_repositories,
    parse_id,
)
from .catalog import BUILT_IN_MODEL, PUBLISHED, Fit, PublishedModel, estimate_fit, token_nbytes
from .names import ambiguity, closest_names, match_names, suggestion

BUILT_IN_NAMES = ("embedded", "built-in")  # of the model in the package; lists show the first
REPORT_NAME = "conversion.json"
MAX_ENTRIES = 2000  # per folder
MAX_USED = 50
Origin = Literal["models folder", "hub cache", "recently used", "built-in"]


class ModelNotDownloaded(ModelError):
    """A model that is missing or incomplete on this machine; `id` is its name on the hub."""

    def __init__(self, message: str, id: str):
        super().__init__(message)
        self.id = id


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine; `problem` says why it cannot be loaded. Unknown values are None.

    `nbytes` is the size of the weight files. `bits_per_weight` includes scales, not vision or draft head.
    """

    name: str
    path: Path
    origin: Origin
    nbytes: int = 0
    bits_per_weight: float | None = None
    context: int | None = None
    fit: Fit | None = None
    problem: str | None = None
    id: str | None = None  # on the hub, with an abbreviated commit if several are cached

    def as_json(self) -> dict[str, Any]:
        own = {"path": str(self.path), "fit": self.fit and self.fit.as_json()}
        return vars(self) | own


@dataclass(frozen=True)
class Locations:
    """Where to look for models: the user's `folders`, the cache, and the list of recently used models."""

    folders: tuple[Path, ...] = field(default_factory=lambda: _default_folders())
    cache: Path = field(default_factory=cache_folder)
    used: Path = field(default_factory=lambda: _used_file())

    @classmethod
    def from_setting(cls, models_dir: Iterable[str]) -> "Locations":
        """Return the default locations with the folders of the setting `models_dir`."""
        return cls(tuple(Path(folder).expanduser() for folder in models_dir))


def _default_folders() -> tuple[Path, ...]:
    configured = os.environ.get("QCHAT_MODELS_DIR", "").split(os.pathsep)
    return tuple(Path(folder).expanduser() for folder in configured if folder) or (
        Path("~/models").expanduser(),
    )


def _used_file() -> Path:
    folder = user_folder("XDG_STATE_HOME", ".local/state")
    if folder is None:
        raise UsageError("there is no home folder for the list of used models: set HOME or XDG_STATE_HOME")
    return folder / "models.json"


def find_model(name: str, locations: Locations | None = None) -> Path:
    """Return the folder of a model, given as a path, a Hugging Face id, a name or a unique prefix of one.

    Raises ModelNotDownloaded if it can be downloaded, otherwise ModelError with the closest names.
    """
    name, locations = name.strip(), locations or Locations()
    if not name:
        raise ModelError("the model name is empty: `qchat models` lists the models on this machine")
    path = _expand_path(name)
    if path.is_dir() and (_is_path(name) or (path / CONFIG_NAME).exists()):
        return path
    if is_id(name):
        return _find_id(name, locations)
    if _is_path(name):
        raise ModelError(_explain_missing(path, locations))
    return _find_name(name, locations)


def _find_id(name: str, locations: Locations) -> Path:
    id, revision = parse_id(name)
    known = Repository(locations.cache, id)
    snapshot = known.find_snapshot(revision)
    if snapshot is not None and load_problem(snapshot) is None:
        return snapshot
    if "@" not in name:
        for found in _candidates(locations):
            if found.name.casefold() == id.casefold() and load_problem(found.path) is None:
                return found.path
    if snapshot is not None or known.partial_nbytes():
        raise _not_downloaded(name, "is only partly downloaded: finish it")
    raise _not_downloaded(name, "is not on this machine: download it")


def _find_name(name: str, locations: Locations) -> Path:
    if name in BUILT_IN_NAMES:
        return BUILT_IN_MODEL
    # the first location wins if two models share a name
    here = {found.name: found for found in reversed(_candidates(locations)) if found.problem is None}
    for known in (match_names(name, here), match_names(name, [variant.id for variant in PUBLISHED])):
        if len(known) > 1:
            raise ambiguity(name, sorted(known))
        if known and known[0] in here:
            return _complete_folder(here[known[0]])
        if known:
            raise _not_downloaded(known[0], "is not on this machine: download it")
    near = closest_names(name, [*here, *BUILT_IN_NAMES, *(variant.id for variant in PUBLISHED)])
    hint = suggestion(near) or ": `qchat models` lists the models"
    raise ModelError(f"there is no model {printable(name)} on this machine{hint}")


def _complete_folder(model: LocalModel) -> Path:
    """Return the model's folder. Raises ModelNotDownloaded if it is from the hub and cannot be loaded."""
    if model.id is not None and load_problem(model.path) is not None:
        raise _not_downloaded(model.id, "is only partly downloaded: finish it")
    return model.path


def _not_downloaded(id: str, state: str) -> ModelNotDownloaded:
    return ModelNotDownloaded(f"{id} {state} with `qchat pull {id}`", id)


def published_id(name: str) -> str:
    """Return the id of the published model that `name` matches. Raises ModelError unless exactly one does."""
    matches = match_names(name, [variant.id for variant in PUBLISHED])
    if len(matches) == 1:
        return matches[0]
    near = matches[:5] or closest_names(name, [variant.id for variant in PUBLISHED])
    raise ModelError(f"{printable(name)} is not a Hugging Face id, wanted owner/name{suggestion(near)}")


def list_models(locations: Locations | None = None) -> list[LocalModel]:
    """Return all models on this machine, by location and name. Reads the headers of their weight files."""
    return [with_details(found) for found in _candidates(locations or Locations())]


def model_names(locations: Locations | None = None) -> list[str]:
    """Return the names of all models on this machine, without reading a file of theirs."""
    return [found.name for found in _candidates(locations or Locations())]


def select_model(name: str, listed: Sequence[LocalModel]) -> LocalModel:
    """Return the listed model given as a name, a unique prefix of one or a folder. Raises ModelError."""
    path = (BUILT_IN_MODEL if name in BUILT_IN_NAMES else _expand_path(name)).resolve()
    matches = match_names(name, [model.name for model in listed])
    by_path = [model for model in listed if model.path.resolve() == path]
    found = by_path or [model for model in listed if model.name in matches]
    if len(found) > 1:
        raise ambiguity(name, matches)
    if not found:
        near = closest_names(name, [model.name for model in listed])
        raise ModelError(f"`qchat models` lists no model {printable(name)}{suggestion(near)}")
    return found[0]


def _candidates(locations: Locations) -> list[LocalModel]:
    """Return every folder that has a config, without duplicates and without reading them."""
    found: dict[Path, LocalModel] = {}
    for model in (*_models_in_folders(locations), *_models_in_cache(locations), *_recently_used(locations)):
        found.setdefault(model.path.resolve(), model)
    found.setdefault(BUILT_IN_MODEL.resolve(), LocalModel(BUILT_IN_NAMES[0], BUILT_IN_MODEL, "built-in"))
    return list(found.values())


def _models_in_folders(locations: Locations) -> Iterator[LocalModel]:
    for folder in locations.folders:
        for path in _subfolders(folder):
            inner = [path] if (path / CONFIG_NAME).exists() else _subfolders(path)
            for model in inner:
                if (model / CONFIG_NAME).exists():
                    yield LocalModel(model.relative_to(folder).as_posix(), model, "models folder")


def _subfolders(folder: Path) -> list[Path]:
    try:
        inner = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError:
        return []
    return inner[:MAX_ENTRIES]


def _models_in_cache(locations: Locations) -> Iterator[LocalModel]:
    for known in list_repositories(locations.cache):
        commits, main = known.commits(), known.find_snapshot("main")
        for commit in commits:
            path = known.snapshot(commit)
            name = known.id if len(commits) == 1 or path == main else f"{known.id}@{commit[:8]}"
            if (path / CONFIG_NAME).exists():
                yield LocalModel(name, path, "hub cache", id=name)
        partial = known.partial_nbytes()
        if partial and not commits:
            yield LocalModel(
                known.id,
                known.folder,
                "hub cache",
                partial,
                problem=f"partly downloaded: finish it with `qchat pull {known.id}`",
                id=known.id,
            )


def _recently_used(locations: Locations) -> Iterator[LocalModel]:
    for path in _used_paths(locations):
        if (path / CONFIG_NAME).exists():
            yield LocalModel(path.name, path, "recently used")


def with_details(model: LocalModel) -> LocalModel:
    """Return the model with its sizes and fit, or with the problem that prevents loading it."""
    if model.problem is not None:
        return model
    try:
        return _read_details(model)
    except ModelError as error:
        return replace(model, problem=str(error))


def load_problem(folder: Path) -> str | None:
    """Return why the model in `folder` cannot be loaded, judged by file names and headers; None if it can."""
    return local_model(folder).problem


def local_model(folder: Path) -> LocalModel:
    """Return the model in `folder`, wherever that is, with its sizes."""
    return with_details(LocalModel(folder.name, folder, "recently used"))


def _read_details(model: LocalModel) -> LocalModel:
    """Raises ModelError for a damaged or unsupported model."""
    config = ModelConfig.load(model.path)
    shards = find_shards(model.path)
    headers = read_headers(shards)
    if not shards.index:
        _check_shard_count(shards.paths)
    if not (model.path / "tokenizer.json").exists():
        raise ModelError(f"{model.path} has no tokenizer.json")
    body = head = 0
    for header in headers:
        for entry in header.entries.values():
            if header.path == shards.mtp or split_part(entry.name)[0].startswith(MTP_PREFIX):
                head += entry.end - entry.begin
            elif not is_vision(entry.name):
                body += entry.end - entry.begin
    return replace(
        model,
        nbytes=sum(header.path.stat().st_size for header in headers),
        bits_per_weight=8 * body / sum(prod(spec.shape) for spec in body_specs(config).values()),
        context=config.max_position_embeddings,
        fit=estimate_fit(body + head, token_nbytes(config), config.max_position_embeddings),
    )


def _check_shard_count(paths: Sequence[Path]) -> None:
    """Check the number of shards that their names state, as in -00001-of-00003. Raises ModelError."""
    for path in paths:
        _, of, number = path.stem.rpartition("-of-")
        if of and number.isdigit() and int(number) != len(paths):
            raise ModelError(f"{path.parent} has {len(paths)} of its {int(number)} weight files")


def list_published(locations: Locations | None = None) -> list[PublishedModel]:
    """Return the published models that are not on this machine."""
    here = {found.id for found in _candidates(locations or Locations()) if found.problem is None}
    return [variant for variant in PUBLISHED if variant.id not in here]


def missing_folder_notices(locations: Locations | None = None) -> list[str]:
    """Return a sentence for each configured models folder that does not exist."""
    default = Path("~/models").expanduser()
    configured = [folder for folder in (locations or Locations()).folders if folder != default]
    return [
        f"the models folder {folder} {_explain_absence(folder)}"
        for folder in configured
        if not folder.is_dir()
    ]


def record_use(folder: Path, locations: Locations | None = None) -> None:
    """Put `folder` first among the recently used models. Write errors are ignored."""
    locations, folder = locations or Locations(), folder.expanduser().absolute()
    if folder.resolve() == BUILT_IN_MODEL.resolve():
        return
    used = [entry for entry in _read_recently_used(locations) if entry["path"] != str(folder)]
    text = json.dumps({"used": [{"path": str(folder), "when": time.time()}, *used][:MAX_USED]})
    with suppress(OSError):
        locations.used.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(locations.used, text)


def last_used_folder(locations: Locations | None = None) -> Path | None:
    """Return the folder of the most recently used model, which may no longer exist; None if there is none."""
    return next((Path(entry["path"]) for entry in _read_recently_used(locations or Locations())), None)


def default_model(locations: Locations | None = None) -> tuple[Path, str | None]:
    """Return the most recently used model, or the built-in one.

    The second value explains why the most recently used one cannot be loaded, if so.
    """
    locations = locations or Locations()
    last = last_used_folder(locations)
    if last is None:
        return BUILT_IN_MODEL, None
    problem = load_problem(last) if last.is_dir() else _explain_missing(last, locations)
    if problem is None:
        return last, None
    return BUILT_IN_MODEL, f"{problem}; using the built-in model instead"


def _read_recently_used(locations: Locations) -> list[dict[str, Any]]:
    """Return the recently used models, newest first. An invalid file counts as empty."""
    try:
        entries = read_json(locations.used, ModelError).get("used")
    except ModelError:
        return []
    return [entry for entry in entries if _is_entry(entry)] if isinstance(entries, list) else []


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and Path(entry["path"]).is_absolute()
        and isinstance(entry.get("when"), int | float)
    )


def _explain_missing(path: Path, locations: Locations) -> str:
    """Return a sentence on why there is no model at `path`."""
    path = path.absolute()
    used = {entry["path"]: entry["when"] for entry in reversed(_read_recently_used(locations))}
    when = used.get(str(path))
    last_use = f", last used on {time.strftime('%Y-%m-%d', time.localtime(when))}," if when else ""
    if path.exists():
        return f"{path} is a file, wanted a model folder"
    near = get_close_matches(path.name, [other.name for other in _subfolders(path.parent)], 1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"the model folder {path}{last_use} {_explain_absence(path)}{hint}"


def _explain_absence(path: Path) -> str:
    """Return "does not exist", or the disk of `path` if it is not mounted."""
    mounts = [mount for mount in (Path("/Volumes"), Path("/media"), Path("/mnt")) if mount in path.parents]
    if mounts and not (disk := mounts[0] / path.relative_to(mounts[0]).parts[0]).exists():
        return f"is on {disk}, which is not mounted"
    return "does not exist"


@dataclass(frozen=True)
class Removal:
    """The deletion of one model: exactly `paths`, `nbytes` in total, and folders that become empty."""

    model: LocalModel
    paths: tuple[Path, ...]
    nbytes: int

    def execute(self) -> list[Path]:
        """Delete the files; return other files that remain in the folder. Raises ModelError."""
        try:
            return self._delete()
        except OSError as error:
            raise ModelError(
                f"cannot delete {self.model.name}: {error.filename}: {error.strerror}"
            ) from error

    def _delete(self) -> list[Path]:
        folder = self.model.path
        if self.model.origin == "hub cache":
            containing_repository(folder).delete(folder.name)
            return []
        for path in self.paths:
            path.unlink(missing_ok=True)
        if folder.is_symlink() or not folder.exists():
            return []
        for inner in (*_subfolders(folder), folder):
            with suppress(OSError):  # not empty
                inner.rmdir()
        return sorted(folder.iterdir()) if folder.exists() else []


def plan_removal(model: LocalModel) -> Removal:
    """List the files to delete for `model`. Raises UsageError for the built-in model."""
    if model.origin == "built-in":
        raise UsageError("the built-in model is part of qchat and cannot be deleted")
    if model.origin == "hub cache":
        paths = tuple(path for path in sorted(model.path.rglob("*")) if not path.is_dir())
    elif model.path.is_symlink():
        paths = (model.path,)
    else:
        paths = tuple(path for path in sorted(model.path.rglob("*")) if _belongs_to_model(path, model.path))
    return Removal(model, paths, sum(map(file_nbytes, paths)))


def _belongs_to_model(path: Path, folder: Path) -> bool:
    """Tell whether a file in a model's folder is part of the model; other files are never deleted."""
    name = path.relative_to(folder).as_posix()
    return not path.is_dir() and (
        name in (*SMALL_NAMES, INDEX_NAME, REPORT_NAME, *MTP_NAMES) or PLAIN_NAME.fullmatch(name) is not None
    )


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1


def _expand_path(name: str) -> Path:
    """Expand ~ in a path. Raises ModelError for an invalid path."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except RuntimeError as error:
        raise ModelError(f"cannot expand {printable(name)}: no such user") from error
    except OSError as error:
        raise ModelError(f"{printable(name)} is not a valid path: {error.strerror}") from error
    return path


def _used_paths(locations: Locations) -> Iterator[Path]:
    yield from (Path(entry["path"]) for entry in _read_recently_used(locations))
