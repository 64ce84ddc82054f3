"""Download of one file of known size and hash: resumed with byte ranges, retried, verified.

huggingface_hub restarts an interrupted file from the beginning, because its temporary files have random
names. So this module sends the range requests itself; Xet storage answers them too. Refuses more bytes than
listed and a hash that differs.
"""

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
from huggingface_hub import constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status

READ_NBYTES = 1 << 20
# how long failures may continue after the last new byte: HTTP errors, and lost connections
SERVER_ERROR_SECONDS = 3.0
CONNECTION_LOST_SECONDS = 30.0
ANSWER_SECONDS = 3.5  # to connect, and between two reads
FIRST_PAUSE_SECONDS = 0.25  # doubles with every retry
LOCK_PAUSE_SECONDS = 0.1
TEMPORARY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

Request = Callable[[str, int], AbstractContextManager[httpx2.Response]]
"""Opens a stream of the file with this name, starting at this byte."""


class TransferStopped(Exception):
    """The transfer was stopped; the bytes received so far are kept."""


class BadResponse(Exception):
    """A response that cannot be the file; the message says what was found and wanted."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; `digest` is its sha256 in hex, or the SHA-1 of its git blob."""

    name: str
    nbytes: int
    digest: str

    def new_hash(self) -> Any:
        """Return an empty hash object of the digest's kind."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.nbytes, usedforsecurity=False)


@dataclass
class Monitor:
    """State shared by the threads of one download; each thread writes only the counts of its own file."""

    stop: threading.Event = field(default_factory=threading.Event)
    done: dict[str, int] = field(default_factory=dict)  # bytes of each file on the disk
    received: dict[str, int] = field(default_factory=dict)  # bytes of each file from the network
    problem: str = ""  # why no bytes arrive at the moment

    def raise_if_stopped(self) -> None:
        """Raises TransferStopped."""
        if self.stop.is_set():
            raise TransferStopped

    def pause(self, seconds: float) -> None:
        """Wait, unless stopped. Raises TransferStopped."""
        self.stop.wait(seconds)
        self.raise_if_stopped()


class Transfer:
    """The transfer of `file` into the open file `out`, which keeps the received bytes on any error."""

    def __init__(self, file: RemoteFile, out: BinaryIO, request: Request, monitor: Monitor):
        self._file, self._out, self._request, self._monitor = file, out, request, monitor
        self._hash = file.new_hash()
        self._position = self._best = 0
        self._last_progress = time.monotonic()

    def run(self) -> None:
        """Fill `out` with the whole file. Raises TransferStopped, BadResponse, OSError, httpx2 errors."""
        self._resume()
        pause, mismatches = FIRST_PAUSE_SECONDS, 0
        while True:
            best = self._best
            try:
                self._receive()
                if self._hash.hexdigest() == self._file.digest:
                    return
                self._restart()
                mismatches += 1
                if mismatches > 1:
                    raise _hash_mismatch(self._file)
            except (HfHubHTTPError, httpx2.RequestError, BadResponse) as error:
                pause = FIRST_PAUSE_SECONDS if self._best > best else 2 * pause
                self._wait_before_retry(error, pause, final=mismatches > 1)

    def _resume(self) -> None:
        """Count and hash the bytes left by an earlier run."""
        self._out.seek(0)
        while chunk := self._out.read(READ_NBYTES):
            self._monitor.raise_if_stopped()
            if self._position + len(chunk) > self._file.nbytes:
                self._restart()
                return
            self._count(chunk)
        self._best, self._last_progress = self._position, time.monotonic()

    def _receive(self) -> None:
        """Receive all missing bytes in one request."""
        if self._position == self._file.nbytes:
            return
        with self._request(self._file.name, self._position) as response:
            self._check_response(response)
            for chunk in response.iter_bytes():
                self._monitor.raise_if_stopped()
                self._append(chunk)
        if self._position < self._file.nbytes:
            raise BadResponse(f"{self._file.name} ended {self._file.nbytes - self._position:,} bytes early")

    def _check_response(self, response: httpx2.Response) -> None:
        """Raises BadResponse and HfHubHTTPError."""
        if response.status_code == 416:
            self._restart()
            raise BadResponse(f"the server rejects the requested range of {self._file.name}")
        hf_raise_for_status(response)
        if response.status_code != 206:
            self._restart()  # a server without range support sends the whole file
        elif not self._is_requested_range(response.headers.get("content-range", "")):
            raise BadResponse(f"the server sent a different range of {self._file.name} than requested")
        missing = self._file.nbytes - self._position
        length = response.headers.get("content-length")
        if length != str(missing) and length is not None and "content-encoding" not in response.headers:
            raise BadResponse(f"the server announces {length} bytes of {self._file.name}, wanted {missing}")

    def _is_requested_range(self, content_range: str) -> bool:
        found = CONTENT_RANGE.fullmatch(content_range)
        return (
            found is not None
            and int(found[1]) == self._position
            and found[2] in ("*", str(self._file.nbytes))
        )

    def _append(self, chunk: bytes) -> None:
        if self._position + len(chunk) > self._file.nbytes:
            raise BadResponse(f"{self._file.name} is longer than the {self._file.nbytes:,} bytes listed")
        self._out.write(chunk)
        self._count(chunk)
        received = self._monitor.received.get(self._file.name, 0)
        self._monitor.received[self._file.name] = received + len(chunk)
        self._monitor.problem = ""
        if self._position > self._best:
            self._best, self._last_progress = self._position, time.monotonic()

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._position += len(chunk)
        self._monitor.done[self._file.name] = self._position

    def _restart(self) -> None:
        self._out.seek(0)
        self._out.truncate()
        self._hash, self._position = self._file.new_hash(), 0
        self._monitor.done[self._file.name] = 0

    def _wait_before_retry(self, error: Exception, pause: float, *, final: bool) -> None:
        """Wait `pause` seconds, or as long as the server asks; raise `error` if a retry is pointless."""
        lost = isinstance(error, httpx2.RequestError)
        limit = CONNECTION_LOST_SECONDS if lost and self._monitor.received else SERVER_ERROR_SECONDS
        pause = retry_after_seconds(error) or pause
        if final or not is_temporary(error) or time.monotonic() + pause > self._last_progress + limit:
            raise error
        self._monitor.problem = "no connection, retrying" if lost else "server error, retrying"
        self._monitor.pause(pause)


def hub_request(id: str, commit: str) -> Request:
    """Return a function that requests files of `id` at `commit`.

    The access token is sent to the hub only, not to servers that it redirects to.
    """

    def request(name: str, begin: int) -> AbstractContextManager[httpx2.Response]:
        part = {"range": f"bytes={begin}-"} if begin else {}
        headers = {**request_headers(), **part}
        url = hf_hub_url(id, name, revision=commit, endpoint=constants.ENDPOINT)
        return get_session().stream("GET", url, headers=headers, timeout=ANSWER_SECONDS)

    return request


def request_headers() -> dict[str, str]:
    """Return the headers of a request to the hub, with the user's access token if there is one."""
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    login = {"authorization": f"Bearer {token}"} if token else {}
    return {"accept-encoding": "identity", "user-agent": "qchat", **login}


def is_temporary(error: Exception) -> bool:
    """Tell whether a retry may succeed."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in TEMPORARY_STATUSES


def retry_after_seconds(error: Exception) -> int:
    """Return how long the server asks clients to wait; 0 if it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return 0
    value = error.response.headers.get("retry-after", "")
    return min(int(value), 10**6) if re.fullmatch(r"[0-9]{1,9}", value) else 0


def is_intact(path: Path, file: RemoteFile, monitor: Monitor) -> bool:
    """Verify that the file at `path` is `file`, counting its bytes. Raises TransferStopped, OSError."""
    if not path.is_file() or path.stat().st_size != file.nbytes:
        return False
    digest = file.new_hash()
    with path.open("rb") as data:
        while chunk := data.read(READ_NBYTES):
            monitor.raise_if_stopped()
            digest.update(chunk)
            monitor.done[file.name] = monitor.done.get(file.name, 0) + len(chunk)
    same = digest.hexdigest() == file.digest
    monitor.done[file.name] = file.nbytes if same else 0
    return same


@contextmanager
def exclusive_lock(path: Path, monitor: Monitor) -> Iterator[None]:
    """Hold the lock file `path`, against other processes and threads. Raises TransferStopped, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while not _try_lock(file.fileno()):
            monitor.problem = "waiting for another process that downloads the same"
            monitor.pause(LOCK_PAUSE_SECONDS)
        yield


def _try_lock(descriptor: int) -> bool:
    """Return False while another process holds the lock; True also on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def commit_file(out: BinaryIO, path: Path) -> None:
    """Flush the finished file `out` to the disk, then rename it to `path`. Raises OSError."""
    out.flush()
    os.fsync(out.fileno())
    Path(out.name).replace(path)


def _hash_mismatch(file: RemoteFile) -> BadResponse:
    kind = "sha256" if len(file.digest) == 64 else "git hash"
    return BadResponse(f"{file.name} arrived twice with a {kind} other than the listed {file.digest}")
