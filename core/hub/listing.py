"""The plan of a download: which files of a repository a model needs, read from the hub without writing any.

File names are taken from a fixed list or must match one pattern; other files are ignored.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelInfo, constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status
from huggingface_hub.utils import logging as library_log

from ..checkpoint.config import ModelConfig
from ..checkpoint.header import parse_table
from ..checkpoint.shards import INDEX_NAME, MAX_INDEX_NBYTES, MAX_SHARDS, MTP_NAMES, PLAIN_NAME
from ..errors import ConfigError, DoesNotFit, ModelError
from ..machine.files import MAX_JSON_NBYTES, decode_text, file_nbytes, parse_json
from ..quoting import printable
from .cache import COMMIT, CONFIG_NAME, SMALL_NAMES, Repository, cache_folder, parse_id
from .catalog import Fit, estimate_fit, token_nbytes
from .failures import FAILURES, DownloadCancelled, explain_failure, hub_host
from .tasks import Task, wait_for
from .transfer import (
    ANSWER_SECONDS,
    FIRST_PAUSE_SECONDS,
    SERVER_ERROR_SECONDS,
    BadResponse,
    Monitor,
    RemoteFile,
    Transfer,
    TransferStopped,
    hub_request,
    is_intact,
    is_temporary,
    request_headers,
    retry_after_seconds,
)

MAX_SMALL_NBYTES = 128 << 20  # of one file that holds no weights; no loader reads more
MAX_SMALL_TOTAL_NBYTES = 256 << 20
MAX_LISTING_NBYTES = 16 << 20
MAX_LISTED_FILES = 100_000
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# names that Windows reserves for devices
DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
FIRST_ANSWER_SECONDS = 4.0  # includes the name lookup, which no socket timeout covers
PLAN_SECONDS = 180.0  # for config and index together, 66 MB at most
SPARE_NBYTES = 64 << 20  # to leave free on the disk
GB = 10**9


@dataclass(frozen=True)
class DownloadPlan:
    """The files of `id` at `commit` that a model needs; `loaded` holds those read for the plan."""

    id: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    config: ModelConfig
    cache: Path
    loaded: Mapping[str, bytes] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def fit(self) -> Fit:
        """The estimate for this machine. It includes a vision tower, although that is not loaded."""
        weights = sum(file.nbytes for file in self.files if file.name.endswith(".safetensors"))
        return estimate_fit(weights, token_nbytes(self.config), self.config.max_position_embeddings)

    @property
    def repository(self) -> Repository:
        return Repository(self.cache, self.id)

    @property
    def folder(self) -> Path:
        """The model's folder after the download."""
        return self.repository.snapshot(self.commit)

    @property
    def missing_nbytes(self) -> int:
        """Bytes left to download, judged by file sizes alone."""
        return sum(file.nbytes - self._present_nbytes(file) for file in self.files)

    @property
    def free_nbytes(self) -> int:
        """Free bytes on the disk of the cache."""
        existing = next(path for path in (self.cache, *self.cache.parents) if path.exists())
        return shutil.disk_usage(existing).free

    def _present_nbytes(self, file: RemoteFile) -> int:
        for path in (self.repository.blob(file.digest), self.folder / file.name):
            if file_nbytes(path) == file.nbytes:
                return file.nbytes
        return min(file_nbytes(self.repository.partial(file.digest)), file.nbytes)

    def check_disk(self) -> None:
        """Raise DoesNotFit if the disk is too small."""
        missing, free = self.missing_nbytes, self.free_nbytes
        if missing and missing + SPARE_NBYTES > free:
            raise DoesNotFit(
                f"{self.id} needs {missing / GB:.2f} GB on the disk of {self.cache}, where "
                f"{free / GB:.2f} GB are free: delete files, or set HF_HOME to a folder on another disk"
            )


def never() -> bool:
    return False


def plan_download(
    id: str, revision: str | None = None, *, cancelled: Callable[[], bool] = never
) -> DownloadPlan:
    """List the files to download for `id`, read from the hub; writes nothing.

    Raises UsageError for an invalid id, ModelError for a model that cannot be downloaded or run, and
    DownloadCancelled.
    """
    id, revision = parse_id(f"{id}@{revision}" if revision else id)
    constants.HF_HUB_DISABLE_TELEMETRY = True  # otherwise the library reports usage to the hub
    library_log.set_verbosity_error()  # its warnings would overwrite the screen
    try:
        first, second = Monitor(), Monitor()
        listing = Task(lambda: _read_listing(id, revision, first))
        [info] = wait_for([listing], first, cancelled, FIRST_ANSWER_SECONDS)
        commit, listed = _read_commit(info, id), dict(_list_files(info, id))
        planning = Task(lambda: _make_plan(id, revision, commit, listed, second))
        [plan] = wait_for([planning], second, cancelled, PLAN_SECONDS)
        return plan
    except TransferStopped:
        raise DownloadCancelled(f"the download of {id} was cancelled before it began") from None
    except FAILURES as error:
        raise explain_failure(error, id, revision) from error


def _read_listing(id: str, revision: str, monitor: Monitor) -> ModelInfo:
    """Return the hub's listing of a repository; retries temporary errors."""
    end, pause = time.monotonic() + SERVER_ERROR_SECONDS, FIRST_PAUSE_SECONDS
    while True:
        try:
            return _request_listing(id, revision, monitor)
        except HfHubHTTPError as error:
            pause = retry_after_seconds(error) or 2 * pause
            if not is_temporary(error) or time.monotonic() + pause > end:
                raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadResponse("not a file listing") from error
        monitor.pause(pause)


def _request_listing(id: str, revision: str, monitor: Monitor) -> ModelInfo:
    """Return the hub's listing, of at most MAX_LISTING_NBYTES, however it is packed; can be stopped."""
    url = f"{constants.ENDPOINT}/api/models/{id}/revision/{quote(revision, safe='')}"
    data = bytearray()
    with get_session().stream(
        "GET", url, params={"blobs": "true"}, headers=request_headers(), timeout=ANSWER_SECONDS
    ) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            monitor.raise_if_stopped()
            data += chunk
            if len(data) > MAX_LISTING_NBYTES:
                raise BadResponse(f"a file listing of more than {MAX_LISTING_NBYTES:,} bytes")
    fields = parse_json(data.decode(), "the file listing", ValueError)
    if len(fields.get("siblings") or ()) > MAX_LISTED_FILES:
        raise BadResponse(f"a file listing of more than {MAX_LISTED_FILES:,} files")
    return ModelInfo(**fields)


def _read_commit(info: ModelInfo, id: str) -> str:
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise ModelError(f"{hub_host()} lists no valid commit for {id}")
    return info.sha


def _list_files(info: ModelInfo, id: str) -> Iterator[tuple[str, RemoteFile]]:
    """Yield the files that a model may need, by name. Raises ModelError for an invalid listing."""
    for entry in info.siblings or ():
        name = entry.rfilename
        if name not in (*SMALL_NAMES, INDEX_NAME, *MTP_NAMES) and not PLAIN_NAME.fullmatch(name):
            continue
        nbytes, digest = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
        if not isinstance(nbytes, int) or nbytes < 0 or not DIGEST.fullmatch(str(digest)):
            raise ModelError(f"{hub_host()} lists {name} of {id} without a valid size and hash")
        yield name, RemoteFile(name, nbytes, str(digest))


def _make_plan(
    id: str, revision: str, commit: str, listed: Mapping[str, RemoteFile], monitor: Monitor
) -> DownloadPlan:
    """Read config and index and select the files. Raises ModelError for a model that qchat cannot run."""
    cache = cache_folder()
    loaded: dict[str, bytes] = {}
    for name, limit in ((CONFIG_NAME, MAX_JSON_NBYTES), (INDEX_NAME, MAX_INDEX_NBYTES)):
        if name in listed:
            loaded[name] = _read_small_file(id, commit, listed[name], limit, monitor)
    if CONFIG_NAME not in loaded:
        raise ModelError(f"qchat cannot run {id}: it has no {CONFIG_NAME}")
    where = f"{CONFIG_NAME} of {id}"
    config = ModelConfig.parse(
        parse_json(decode_text(loaded[CONFIG_NAME], where, ConfigError), where, ConfigError), where
    )
    names = [
        *_weight_names(id, listed, loaded.get(INDEX_NAME)),
        *(name for name in MTP_NAMES if name in listed),
    ]
    if INDEX_NAME in loaded:
        names.append(INDEX_NAME)
    names += [name for name in SMALL_NAMES if name in listed]
    files = tuple(listed[name] for name in dict.fromkeys(names))
    _check_small_files([file for file in files if not file.name.endswith(".safetensors")], id)
    return DownloadPlan(id, revision, commit, files, config, cache, loaded)


def _weight_names(id: str, listed: Mapping[str, RemoteFile], index: bytes | None) -> list[str]:
    """Return the names of the shards, all listed and distinct. Raises ModelError."""
    if index is not None:
        table = parse_table(index, f"{INDEX_NAME} of {id}").get("weight_map")
        names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
    else:
        names = sorted(name for name in listed if name.startswith("model") and PLAIN_NAME.fullmatch(name))
    if not names or len(names) > MAX_SHARDS:
        raise ModelError(f"qchat cannot run {id}: it has {len(names)} .safetensors files")
    for name in names:
        if not PLAIN_NAME.fullmatch(name) or DEVICE.fullmatch(name):
            raise ModelError(
                f"{id} has weights in {printable(name)}, which is not a valid name for a .safetensors file"
            )
        if name not in listed:
            raise ModelError(
                f"{id} is incomplete on {hub_host()}: {name} is in its index but not among its files"
            )
    if len({name.casefold() for name in names}) < len(names):
        raise ModelError(
            f"{id} has weight files whose names differ in case only, which some file systems cannot store"
        )
    return names


def _read_small_file(id: str, commit: str, file: RemoteFile, limit: int, monitor: Monitor) -> bytes:
    """Return the bytes of a small file, verified, from the cache or the hub."""
    if file.nbytes > limit:
        raise _too_large(file, id, limit)
    known = Repository(cache_folder(), id)
    for path in (known.blob(file.digest), known.snapshot(commit) / file.name):
        if is_intact(path, file, monitor):
            return path.read_bytes()
    out = BytesIO()
    Transfer(file, out, hub_request(id, commit), monitor).run()
    return out.getvalue()


def _check_small_files(files: Sequence[RemoteFile], id: str) -> None:
    """Raise ModelError if one of the files without weights is too large, or all of them together."""
    for file in files:
        if file.nbytes > MAX_SMALL_NBYTES:
            raise _too_large(file, id, MAX_SMALL_NBYTES)
    total = sum(file.nbytes for file in files)
    if total > MAX_SMALL_TOTAL_NBYTES:
        raise ModelError(
            f"the files of {id} besides its weights are too large: {total:,} bytes, "
            f"at most {MAX_SMALL_TOTAL_NBYTES:,} are allowed"
        )


def _too_large(file: RemoteFile, id: str, limit: int) -> ModelError:
    return ModelError(
        f"{file.name} of {id} is too large: {file.nbytes:,} bytes, at most {limit:,} are allowed"
    )
