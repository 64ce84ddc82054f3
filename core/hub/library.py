"""Models by name: what is on this machine, what is known to be published, what of it would fit into memory.

Looks into the models folders, the Hugging Face cache and the folders used before; knows the built-in model.
Never touches the network, never imports MLX, and deletes nothing but files of a model that it listed.
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
from ..checkpoint.header import printable
from ..checkpoint.layouts import MTP_PREFIX, body_specs, is_vision, split_part
from ..checkpoint.shards import INDEX_NAME, MTP_NAMES, PLAIN_NAME, find_shards, read_headers
from ..errors import ModelError, UsageError
from ..machine.files import read_json, write_whole
from .cache import (
    CONFIG_NAME,
    SMALL_NAMES,
    Repository,
    cache_folder,
    file_nbytes,
    is_id,
    parse_id,
    repositories,
    repository_of,
)
from .catalog import EMBEDDED_MODEL, PUBLISHED, Fit, Published, fit, token_nbytes

BUILT_IN = "built-in"
REPORT_NAME = "conversion.json"
MAX_ENTRIES = 2000  # of one folder of models
MAX_USED = 50
Origin = Literal["models folder", "hub cache", "used before", "built-in"]


class NotHere(ModelError):
    """A model that is not on this machine, not whole at least; `id`, with @revision, could be fetched."""

    def __init__(self, sentence: str, id: str):
        super().__init__(sentence)
        self.id = id


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine. `problem` says why it cannot be loaded; what could not be found out is None.

    `nbytes` are those of the weight files; `bits_per_weight` counts scales, and neither vision nor heads.
    """

    name: str
    path: Path
    origin: Origin
    nbytes: int = 0
    bits_per_weight: float | None = None
    context: int | None = None
    fit: Fit | None = None
    problem: str | None = None
    id: str | None = None  # of the hub, with the commit's beginning unless it is the only one

    def as_json(self) -> dict[str, Any]:
        own = {"path": str(self.path), "fit": self.fit and self.fit.as_json()}
        return vars(self) | own


@dataclass(frozen=True)
class Places:
    """Where models are looked for: the user's `folders`, the cache, and the list of those `used` before."""

    folders: tuple[Path, ...] = field(default_factory=lambda: _folders())
    cache: Path = field(default_factory=cache_folder)
    used: Path = field(default_factory=lambda: _used_file())

    @classmethod
    def of(cls, models_dir: Iterable[str]) -> "Places":
        """With the setting `models_dir`."""
        return cls(tuple(Path(folder).expanduser() for folder in models_dir))


def _folders() -> tuple[Path, ...]:
    named = os.environ.get("QCHAT_MODELS_DIR", "").split(os.pathsep)
    return tuple(Path(folder).expanduser() for folder in named if folder) or (Path("~/models").expanduser(),)


def _used_file() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path("~/.local/state").expanduser()
    return home / "qchat" / "models.json"


def find(name: str, places: Places | None = None) -> Path:
    """The folder that `name` means: a folder, an id of the hub, a name, or a unique beginning of one.

    Raises NotHere for one that could be fetched, ModelError with the nearest names for any other.
    """
    name, places = name.strip(), places or Places()
    if not name:
        raise ModelError("no model was named: `qchat models` lists those on this machine")
    path = _expanded(name)
    if path.is_dir() and (_is_path(name) or (path / CONFIG_NAME).exists()):
        return path
    if is_id(name):
        return _find_id(name, places)
    if _is_path(name):
        raise ModelError(_vanished(path, places))
    return _find_name(name, places)


def _find_id(name: str, places: Places) -> Path:
    id, revision = parse_id(name)
    known = Repository(places.cache, id)
    snapshot = known.find(revision)
    if snapshot is not None and incomplete(snapshot) is None:
        return snapshot
    if "@" not in name:
        for found in _candidates(places):
            if found.name.casefold() == id.casefold() and incomplete(found.path) is None:
                return found.path
    begun = snapshot is not None or known.partial_nbytes()
    state = "is here only in part" if begun else "is not on this machine"
    raise NotHere(f"{name} {state}: `qchat pull {name}` fetches it", name)


def _find_name(name: str, places: Places) -> Path:
    if name in (BUILT_IN, "embedded"):
        return EMBEDDED_MODEL
    # of two with one name the first place has it
    here = {found.name: found for found in reversed(_candidates(places)) if found.problem is None}
    for known in (_meant(name, here), _meant(name, [variant.id for variant in PUBLISHED])):
        if len(known) > 1:
            raise ModelError(f"{printable(name)} could mean {', '.join(sorted(known)[:5])}: write more of it")
        if known and known[0] in here:
            return _whole(here[known[0]])
        if known:
            raise NotHere(f"{known[0]} is not on this machine: `qchat pull {known[0]}` fetches it", known[0])
    near = nearest(name, [*here, *(variant.id for variant in PUBLISHED)])
    hint = f"; did you mean {' or '.join(near)}?" if near else ": `qchat models` lists those that are"
    raise ModelError(f"there is no model {printable(name)} on this machine{hint}")


def _whole(model: LocalModel) -> Path:
    """Its folder. Raises NotHere for one of the hub's that lacks files; loading refuses others."""
    if model.id is not None and incomplete(model.path) is not None:
        raise NotHere(f"{model.id} is here only in part: `qchat pull {model.id}` fetches the rest", model.id)
    return model.path


def _meant(name: str, known: Iterable[str]) -> list[str]:
    """Exact names before beginnings; the owner may be left out, and capitals do not count."""
    wanted, known = name.casefold(), list(known)
    forms = {full: (full.casefold(), full.casefold().rpartition("/")[2]) for full in known}
    exact = [full for full in known if wanted in forms[full]]
    return exact or [full for full in known if any(form.startswith(wanted) for form in forms[full])]


def known_id(name: str) -> str:
    """The id of the one published model that `name` or a beginning of it means. Raises ModelError."""
    meant = _meant(name, [variant.id for variant in PUBLISHED])
    if len(meant) == 1:
        return meant[0]
    near = meant[:5] or nearest(name, [variant.id for variant in PUBLISHED])
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ModelError(f"{printable(name)} is no id of the hub, wanted owner/name{hint}")


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The names most like `name`, with or without their owners."""
    forms = {form.casefold(): full for full in known for form in (full, full.rpartition("/")[2])}
    wanted = name.casefold() if "/" in name else name.casefold().rpartition("/")[2]
    return list(dict.fromkeys(forms[form] for form in get_close_matches(wanted, forms, most)))


def models(places: Places | None = None) -> list[LocalModel]:
    """All models on this machine, weighed, by place, then by name. Reads the headers of weight files."""
    return [weighed(found) for found in _candidates(places or Places())]


def named(name: str, listed: Sequence[LocalModel]) -> LocalModel:
    """The one of `listed` that `name`, a unique beginning of one, or a folder means. Raises ModelError."""
    path = _expanded(name).resolve()
    at = [model for model in listed if model.path.resolve() == path]
    meant = _meant(name, [model.name for model in listed])
    found = at or [model for model in listed if model.name in meant]
    if len(found) > 1:
        raise ModelError(f"{printable(name)} could mean {', '.join(meant[:5])}: write more of it")
    if not found:
        near = nearest(name, [model.name for model in listed])
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"{printable(name)} is not among the models that `qchat models` lists{hint}")
    return found[0]


def _candidates(places: Places) -> list[LocalModel]:
    """Every folder that says it is a model, once, not opened."""
    found: dict[Path, LocalModel] = {}
    for model in (*_in_folders(places), *_in_cache(places), *_used(places)):
        found.setdefault(model.path.resolve(), model)
    found.setdefault(EMBEDDED_MODEL.resolve(), LocalModel(BUILT_IN, EMBEDDED_MODEL, "built-in"))
    return list(found.values())


def _in_folders(places: Places) -> Iterator[LocalModel]:
    for folder in places.folders:
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


def _in_cache(places: Places) -> Iterator[LocalModel]:
    for known in repositories(places.cache):
        commits, main = known.commits(), known.find("main")
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
                problem=f"fetched in part: `qchat pull {known.id}` goes on",
                id=known.id,
            )


def _used(places: Places) -> Iterator[LocalModel]:
    for path in _used_paths(places):
        if (path / CONFIG_NAME).exists():
            yield LocalModel(path.name, path, "used before")


def weighed(model: LocalModel) -> LocalModel:
    """With sizes, fit, and what stands in the way of loading it."""
    if model.problem is not None:
        return model
    try:
        return _weigh(model)
    except ModelError as error:
        return replace(model, problem=str(error))


def incomplete(folder: Path) -> str | None:
    """Why the model in `folder` cannot be loaded, going by its file names and headers; None if it can."""
    return weighed(LocalModel(folder.name, folder, "used before")).problem


def _weigh(model: LocalModel) -> LocalModel:
    """Raises ModelError for a folder that is damaged or of another kind."""
    config = ModelConfig.load(model.path)
    shards = find_shards(model.path)
    headers = read_headers(shards)
    if not shards.index:
        _check_numbers(shards.paths)
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
        fit=fit(body + head, token_nbytes(config), config.max_position_embeddings),
    )


def _check_numbers(paths: Sequence[Path]) -> None:
    """Without an index the names themselves say how many shards there are: -00001-of-00003."""
    for path in paths:
        _, of, number = path.stem.rpartition("-of-")
        if of and number.isdigit() and int(number) != len(paths):
            raise ModelError(f"{path.parent} has {len(paths)} of its {int(number)} weight files")


def published(places: Places | None = None) -> list[Published]:
    """The known variants that are not on this machine."""
    here = {found.id for found in _candidates(places or Places()) if found.problem is None}
    return [variant for variant in PUBLISHED if variant.id not in here]


def notices(places: Places | None = None) -> list[str]:
    """Sentences on folders of models that somebody named and that are not there."""
    default = Path("~/models").expanduser()
    named = [folder for folder in (places or Places()).folders if folder != default]
    return [f"the models folder {folder} {_gone(folder)}" for folder in named if not folder.is_dir()]


def remember(folder: Path, places: Places | None = None) -> None:
    """Note that the model in `folder` was used just now. Where that cannot be written it is forgotten."""
    places, folder = places or Places(), folder.expanduser().absolute()
    if folder.resolve() == EMBEDDED_MODEL.resolve():
        return
    used = [entry for entry in _read_used(places) if entry["path"] != str(folder)]
    text = json.dumps({"used": [{"path": str(folder), "when": time.time()}, *used][:MAX_USED]})
    with suppress(OSError):
        places.used.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(places.used, text)


def last_used(places: Places | None = None) -> Path | None:
    """The folder of the model used last, which may be gone; None where none was used."""
    return next((Path(entry["path"]) for entry in _read_used(places or Places())), None)


def usual(places: Places | None = None) -> tuple[Path, str | None]:
    """The model to begin with where none is named, the one used last or else the built-in one; and, where the
    one used last is gone, a sentence that says so."""
    places = places or Places()
    last = last_used(places)
    if last is None:
        return EMBEDDED_MODEL, None
    problem = incomplete(last) if last.is_dir() else _vanished(last, places)
    if problem is None:
        return last, None
    return EMBEDDED_MODEL, f"{problem}; the built-in model answers instead"


def _read_used(places: Places) -> list[dict[str, Any]]:
    """Newest first. A file that makes no sense counts as none: it only remembers."""
    try:
        entries = read_json(places.used, ModelError).get("used")
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


def _vanished(path: Path, places: Places) -> str:
    """Why there is no model at `path`, from what is known of it."""
    path = path.absolute()
    when = next((entry["when"] for entry in _read_used(places) if entry["path"] == str(path)), None)
    used = f", last used on {time.strftime('%Y-%m-%d', time.localtime(when))}," if when else ""
    if path.exists():
        return f"there is a file at {path}, wanted a model folder"
    near = get_close_matches(path.name, [other.name for other in _subfolders(path.parent)], 1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"the model folder {path}{used} {_gone(path)}{hint}"


def _gone(path: Path) -> str:
    """Names the disk where the path is on one that is not mounted."""
    mounts = [mount for mount in (Path("/Volumes"), Path("/media"), Path("/mnt")) if mount in path.parents]
    if mounts and not (disk := mounts[0] / path.relative_to(mounts[0]).parts[0]).exists():
        return f"is on {disk}, which is not mounted"
    return "does not exist"


@dataclass(frozen=True)
class Removal:
    """The deletion of one model: exactly `paths`, `nbytes` in all, and the folders that get empty."""

    model: LocalModel
    paths: tuple[Path, ...]
    nbytes: int

    def carry_out(self) -> list[Path]:
        """Delete; returns what else is in the model's folder and stays. Raises ModelError."""
        try:
            return self._delete()
        except OSError as error:
            raise ModelError(
                f"{self.model.name} cannot be deleted: {error.filename}: {error.strerror}"
            ) from error

    def _delete(self) -> list[Path]:
        folder = self.model.path
        if self.model.origin == "hub cache":
            repository_of(folder).delete(folder.name)
            return []
        for path in self.paths:
            path.unlink(missing_ok=True)
        if folder.is_symlink() or not folder.exists():
            return []
        for inner in (*_subfolders(folder), folder):
            with suppress(OSError):  # not empty
                inner.rmdir()
        return sorted(folder.iterdir()) if folder.exists() else []


def removal(model: LocalModel) -> Removal:
    """What deleting `model` would delete. Raises UsageError for the built-in one."""
    if model.origin == "built-in":
        raise UsageError("the built-in model is part of qchat and is not deleted")
    if model.origin == "hub cache":
        paths = tuple(path for path in sorted(model.path.rglob("*")) if not path.is_dir())
    elif model.path.is_symlink():
        paths = (model.path,)
    else:
        paths = tuple(path for path in sorted(model.path.rglob("*")) if _is_models(path, model.path))
    return Removal(model, paths, sum(map(file_nbytes, paths)))


def _is_models(path: Path, folder: Path) -> bool:
    """Whether a file in a model's folder belongs to the model; others' files are not touched."""
    name = path.relative_to(folder).as_posix()
    return not path.is_dir() and (
        name in (*SMALL_NAMES, INDEX_NAME, REPORT_NAME, *MTP_NAMES) or PLAIN_NAME.fullmatch(name) is not None
    )


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1


def _expanded(name: str) -> Path:
    """Raises ModelError for what cannot be a path."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except RuntimeError as error:
        raise ModelError(f"there is no home folder for {printable(name)}") from error
    except OSError as error:
        raise ModelError(f"{printable(name)} cannot be looked for: {error.strerror}") from error
    return path


def _used_paths(places: Places) -> Iterator[Path]:
    yield from (Path(entry["path"]) for entry in _read_used(places))
