"""Models from the Hugging Face hub: what one consists of, and fetching it into the cache of all tools.

`plan` asks what a repository holds, `fetch` brings the missing bytes: these two alone touch the network. A
model's folder appears in the cache when all its files are there and checked. Names of files are taken from a
list or match one pattern; nothing else of a repository is fetched.
"""

import errno
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, ModelInfo, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as library_log

from ..checkpoint.config import ModelConfig
from ..checkpoint.header import parse_table, printable
from ..checkpoint.shards import INDEX_NAME, MAX_INDEX_NBYTES, MAX_SHARDS, MTP_NAMES, PLAIN_NAME
from ..errors import ConfigError, DoesNotFit, ModelError, QchatError
from ..machine.eta import TimeEstimate
from ..machine.files import MAX_JSON_NBYTES, parse_json
from .cache import COMMIT, CONFIG_NAME, SMALL_NAMES, Repository, cache_folder, file_nbytes, parse_id
from .catalog import PUBLISHED, Fit, fit, token_nbytes
from .download import (
    FIRST_PAUSE,
    PASSING,
    REFUSED_SECONDS,
    Download,
    RemoteFile,
    Request,
    Stopped,
    Watch,
    WrongAnswer,
    locked,
    matches,
    passing,
    retry_after,
    settle,
)
from .library import nearest

MAX_SMALL_NBYTES = 256 << 20
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # no files on Windows
PARALLEL = 4
ANSWER_SECONDS = 3.5  # to connect, and to send the next bytes
FIRST_ANSWER_SECONDS = 4.0  # with the look-up of the name, which no time limit of a socket covers
TICK = 0.1
GRACE_SECONDS = 0.4  # for threads that were told to stop
SPEED_SECONDS = 10.0  # over which the speed is averaged
SPARE_NBYTES = 64 << 20  # to be left free on the disk
GB = 10**9
KEPT = "; what arrived is kept, and the next fetch goes on from there"
FULL = (errno.ENOSPC, errno.EDQUOT)
TROUBLE = (HfHubHTTPError, httpx2.HTTPError, httpx2.InvalidURL, WrongAnswer, OSError)


class FetchStopped(QchatError):
    """The user stopped it; what arrived is kept and the next fetch goes on from there."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` bytes are on the disk and checked as far as they go."""

    done: int
    total: int
    detail: str
    seconds_left: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {"event": "progress", "unit": "bytes", **vars(self)}


@dataclass(frozen=True)
class Fetch:
    """The files of `id` at `commit` that a model needs; `held` are those that planning has read already."""

    id: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    config: ModelConfig
    cache: Path
    held: Mapping[str, bytes] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def fit(self) -> Fit:
        """A vision tower counts here, though it is not loaded."""
        weights = sum(file.nbytes for file in self.files if file.name.endswith(".safetensors"))
        return fit(weights, token_nbytes(self.config), self.config.max_position_embeddings)

    @property
    def repository(self) -> Repository:
        return Repository(self.cache, self.id)

    @property
    def folder(self) -> Path:
        """Where the model will be."""
        return self.repository.snapshot(self.commit)

    @property
    def missing_nbytes(self) -> int:
        """What is still to come, going by sizes alone."""
        return sum(file.nbytes - self._present(file) for file in self.files)

    @property
    def free_nbytes(self) -> int:
        """Of the disk that the cache is on."""
        there = next(path for path in (self.cache, *self.cache.parents) if path.exists())
        return shutil.disk_usage(there).free

    def _present(self, file: RemoteFile) -> int:
        for path in (self.repository.blob(file.digest), self.folder / file.name):
            if file_nbytes(path) == file.nbytes:
                return file.nbytes
        return min(file_nbytes(self.repository.partial(file.digest)), file.nbytes)

    def check_disk(self) -> None:
        """Raises DoesNotFit."""
        missing, free = self.missing_nbytes, self.free_nbytes
        if missing and missing + SPARE_NBYTES > free:
            raise DoesNotFit(
                f"{self.id} needs {missing / GB:.2f} GB more on the disk of {self.cache} and "
                f"{free / GB:.2f} GB are free: free some, or set HF_HOME to a place on another disk"
            )


def never() -> bool:
    return False


def plan(id: str, revision: str | None = None, *, cancelled: Callable[[], bool] = never) -> Fetch:
    """What `id` consists of, by asking the hub; nothing is written.

    Raises UsageError for what is no id, ModelError for what cannot be had or run, FetchStopped.
    """
    id, revision = parse_id(f"{id}@{revision}" if revision else id)
    constants.HF_HUB_DISABLE_TELEMETRY = True  # else the library asks the hub which programs to tell of
    library_log.set_verbosity_error()  # its warnings would be written over the screen
    try:
        watch = Watch()
        info = _wait([_Task(lambda: _ask(id, revision, watch))], watch, cancelled, FIRST_ANSWER_SECONDS)[0]
        watch, commit = Watch(), _commit(info, id)
        listed = dict(_listed(info, id))
        return _wait([_Task(lambda: _choose(id, revision, commit, listed, watch))], watch, cancelled)[0]
    except Stopped:
        raise FetchStopped(f"asking for {id} was stopped") from None
    except TROUBLE as error:
        raise _sentence(error, id, revision) from error


def fetch(
    wanted: Fetch,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] = never,
) -> Path:
    """Bring the missing bytes, check every file and give the model's folder its name; returns the folder.

    Calls `progress` ten times a second. What arrived is kept however it ends. Raises ModelError, DoesNotFit
    for a full disk, FetchStopped where `cancelled` says so.
    """
    wanted.check_disk()
    watch = Watch()
    meter = _Meter(wanted, watch, progress)
    files: SimpleQueue[RemoteFile] = SimpleQueue()
    for file in sorted(wanted.files, key=lambda file: file.nbytes):
        files.put(file)

    def work() -> None:
        with suppress(Empty):
            while True:
                _bring(wanted, files.get_nowait(), watch)

    try:
        _wait([_Task(work) for _ in range(PARALLEL)], watch, cancelled, tick=meter.tell)
        digests = {file.name: file.digest for file in wanted.files}
        wanted.repository.publish(wanted.commit, digests, wanted.revision)
    except Stopped:
        raise FetchStopped(
            f"fetching {wanted.id} was stopped with {meter.done / GB:.2f} of {wanted.nbytes / GB:.2f} GB "
            "here: the next fetch goes on from there"
        ) from None
    except TROUBLE as error:
        raise _sentence(error, wanted.id, wanted.revision, KEPT) from error
    meter.tell()
    return wanted.folder


class _Task(threading.Thread):
    """A function that runs in a thread, which the end of the process does not wait for."""

    def __init__(self, function: Callable[[], Any]):
        super().__init__(daemon=True)
        self._function = function
        self.value: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:  # raised again in the thread that waits
            self.error = error


def _wait(
    tasks: Sequence[_Task],
    watch: Watch,
    cancelled: Callable[[], bool],
    seconds: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The values of all tasks. The first failure stops the others and is raised; Stopped when `cancelled`."""
    end = time.monotonic() + seconds
    try:
        while running := [task for task in tasks if task.is_alive()]:
            if cancelled():
                raise Stopped
            if time.monotonic() > end:
                raise httpx2.ConnectTimeout(f"no answer within {seconds:g} seconds")
            if any(task.error for task in tasks):
                break
            tick()
            running[0].join(TICK)
    finally:
        watch.stop.set()
        for task in tasks:
            task.join(GRACE_SECONDS / len(tasks))
    errors = [task.error for task in tasks if task.error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [task.value for task in tasks]


class _Meter:
    """Tells how far a fetch is and, from the bytes of the last seconds, how long it will take."""

    def __init__(self, wanted: Fetch, watch: Watch, progress: Callable[[Progress], None] | None):
        self._total, self._watch, self._progress = wanted.nbytes, watch, progress
        self._estimate = TimeEstimate(window=SPEED_SECONDS)

    @property
    def done(self) -> int:
        return sum(tuple(self._watch.done.values()))

    def tell(self) -> None:
        if self._progress is None:
            return
        received = sum(tuple(self._watch.received.values()))
        left = self._estimate.seconds_left(received, self._total - self.done)
        self._progress(Progress(self.done, self._total, self._watch.trouble or "fetching", left))


def _ask(id: str, revision: str, watch: Watch) -> ModelInfo:
    """The hub's listing of a repository, asked for again while the hub is only busy."""
    end, pause = time.monotonic() + REFUSED_SECONDS, FIRST_PAUSE
    while True:
        try:
            return HfApi().model_info(id, revision=revision, timeout=ANSWER_SECONDS, files_metadata=True)
        except HfHubHTTPError as error:
            pause = retry_after(error) or 2 * pause
            if not passing(error) or time.monotonic() + pause > end:
                raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise WrongAnswer("what came is no listing of files") from error
        watch.pause(pause)


def _commit(info: ModelInfo, id: str) -> str:
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise ModelError(f"{_host()} names no commit for {id}, so its files cannot be asked for")
    return info.sha


def _listed(info: ModelInfo, id: str) -> Iterator[tuple[str, RemoteFile]]:
    """By name, the files that a model could need. Raises ModelError for a listing that makes no sense."""
    for entry in info.siblings or ():
        name = entry.rfilename
        if name not in (*SMALL_NAMES, INDEX_NAME, *MTP_NAMES) and not PLAIN_NAME.fullmatch(name):
            continue
        nbytes, digest = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
        if not isinstance(nbytes, int) or nbytes < 0 or not DIGEST.fullmatch(str(digest)):
            raise ModelError(f"{_host()} lists {name} of {id} without its size and hash")
        yield name, RemoteFile(name, nbytes, str(digest))


def _choose(id: str, revision: str, commit: str, listed: Mapping[str, RemoteFile], watch: Watch) -> Fetch:
    """Read config and index, and from these say what is needed. Raises ModelError where it could not run."""
    cache = cache_folder()
    held: dict[str, bytes] = {}
    for name, limit in ((CONFIG_NAME, MAX_JSON_NBYTES), (INDEX_NAME, MAX_INDEX_NBYTES)):
        if name in listed:
            held[name] = _read(id, commit, listed[name], limit, watch)
    if CONFIG_NAME not in held:
        raise ModelError(f"{id} is no model that qchat runs: it has no {CONFIG_NAME}")
    where = f"{CONFIG_NAME} of {id}"
    config = ModelConfig.parse(parse_json(_text(held[CONFIG_NAME], where), where, ConfigError), where)
    names = [*_weights(id, listed, held.get(INDEX_NAME)), *(name for name in MTP_NAMES if name in listed)]
    if INDEX_NAME in held:
        names.append(INDEX_NAME)
    names += [name for name in SMALL_NAMES if name in listed]
    files = tuple(listed[name] for name in dict.fromkeys(names))
    for file in files:
        if not file.name.endswith(".safetensors") and file.nbytes > MAX_SMALL_NBYTES:
            raise ModelError(f"{file.name} of {id} has {file.nbytes:,} bytes, which no such file needs")
    return Fetch(id, revision, commit, files, config, cache, held)


def _weights(id: str, listed: Mapping[str, RemoteFile], index: bytes | None) -> list[str]:
    """The shards by name, all of them listed, none of them like another. Raises ModelError."""
    if index is not None:
        table = parse_table(index, f"{INDEX_NAME} of {id}").get("weight_map")
        names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
    else:
        names = sorted(name for name in listed if name.startswith("model") and PLAIN_NAME.fullmatch(name))
    if not names or len(names) > MAX_SHARDS:
        raise ModelError(f"{id} is no model that qchat runs: it has {len(names)} .safetensors files")
    for name in names:
        if not PLAIN_NAME.fullmatch(name) or DEVICE.fullmatch(name):
            raise ModelError(
                f"{id} keeps weights in {printable(name)}, which is no plain name of a .safetensors file"
            )
        if name not in listed:
            raise ModelError(
                f"{id} is incomplete on {_host()}: {name} is in its index and not among its files"
            )
    if len({name.casefold() for name in names}) < len(names):
        raise ModelError(
            f"{id} has weight files whose names differ in case only, which not every disk can keep"
        )
    return names


def _read(id: str, commit: str, file: RemoteFile, limit: int, watch: Watch) -> bytes:
    """A small file, from the cache or from the hub, with the right hash."""
    if file.nbytes > limit:
        raise ModelError(f"{file.name} of {id} has {file.nbytes:,} bytes, and at most {limit:,} can be used")
    known = Repository(cache_folder(), id)
    for path in (known.blob(file.digest), known.snapshot(commit) / file.name):
        if matches(path, file, watch):
            return path.read_bytes()
    out = BytesIO()
    Download(file, out, _requests(id, commit), watch).run()
    return out.getvalue()


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start:,}") from error


def _requests(id: str, commit: str) -> Request:
    """How to ask for a file of `id` at `commit`; the token stays with the hub when it points elsewhere."""
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    login = {"authorization": f"Bearer {token}"} if token else {}

    def request(name: str, begin: int) -> AbstractContextManager[httpx2.Response]:
        part = {"range": f"bytes={begin}-"} if begin else {}
        headers = {"accept-encoding": "identity", "user-agent": "qchat", **login, **part}
        url = hf_hub_url(id, name, revision=commit, endpoint=constants.ENDPOINT)
        return get_session().stream("GET", url, headers=headers, timeout=ANSWER_SECONDS)

    return request


def _bring(wanted: Fetch, file: RemoteFile, watch: Watch) -> None:
    """See to it that the blob of `file` is there and right."""
    blob = wanted.repository.blob(file.digest)
    with locked(wanted.repository.lock(file.digest), watch):
        if matches(blob, file, watch) or matches(wanted.folder / file.name, file, watch):
            return
        blob.unlink(missing_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with wanted.repository.partial(file.digest).open("a+b") as out:
            if file.name in wanted.held:
                out.truncate(0)
                out.write(wanted.held[file.name])
                watch.done[file.name] = file.nbytes
            else:
                Download(file, out, _requests(wanted.id, wanted.commit), watch).run()
            settle(out, blob)


def _host() -> str:
    return urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT


def _sentence(error: Exception, id: str, revision: str, kept: str = "") -> QchatError:
    """What went wrong, and what the user can do about it."""
    if isinstance(error, OfflineModeIsEnabled):
        return ModelError(f"{id} is not fetched: HF_HUB_OFFLINE is set")
    if isinstance(error, HfHubHTTPError):
        return ModelError(_refusal(error, id, revision))
    if isinstance(error, WrongAnswer):
        return ModelError(f"{id} was not fetched, since {_host()} does not send what it lists: {error}")
    if isinstance(error, httpx2.TimeoutException):
        return ModelError(f"{_host()} does not answer{kept}")
    if isinstance(error, httpx2.HTTPError | httpx2.InvalidURL):
        return ModelError(f"no connection to {_host()} ({printable(str(error))}){kept}")
    if isinstance(error, OSError) and error.errno in FULL:
        return DoesNotFit(f"the disk of {cache_folder()} is full: free some and fetch {id} again to go on")
    return ModelError(f"{id} cannot be kept in {cache_folder()}: {getattr(error, 'strerror', None) or error}")


def _refusal(error: HfHubHTTPError, id: str, revision: str) -> str:
    status, page = error.response.status_code, f"{constants.ENDPOINT}/{id}"
    known = get_token() is not None
    if isinstance(error, GatedRepoError):
        login = "ask for access with the account of your token" if known else "accept them, then set HF_TOKEN"
        return f"{id} is given only to those who accept its terms at {page}: {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"{id} has no revision {printable(revision)}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{id} lists a file that {_host()} does not have: {urlsplit(str(error.request.url)).path}"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        near = nearest(id, [variant.id for variant in PUBLISHED if variant.id != id])
        hint = f"; did you mean {near[0]}?" if near else " (a private one needs HF_TOKEN)"
        return f"{_host()} has no model {id}{hint}"
    if status in (401, 403):
        return f"{_host()} refuses {id}: " + ("HF_TOKEN gives no access to it" if known else "set HF_TOKEN")
    if status == 429:
        seconds = retry_after(error)
        return f"{_host()} has had too many requests: try again in {seconds or 60:,} seconds"
    if status in PASSING:
        return f"{_host()} is in trouble (HTTP status {status}): try to fetch {id} again later"
    return f"{_host()} refuses {id} with HTTP status {status}"
