"""One file from the web whose size and hash are known: resumed by byte ranges, retried, checked.

huggingface_hub starts an interrupted file anew (its temporary files have random names), so the ranges are
asked for here; Xet storage answers them as well. Refuses more bytes than listed and a hash that differs.
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
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status

READ_NBYTES = 1 << 20
# how long failures in a row are borne after the last new byte: of a server that answers, of a lost connection
REFUSED_SECONDS = 3.0
LOST_SECONDS = 30.0
FIRST_PAUSE = 0.25  # seconds; doubles
LOCK_PAUSE = 0.1
PASSING = (408, 425, 429, 500, 502, 503, 504)  # what a server says that may answer better soon
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

Request = Callable[[str, int], AbstractContextManager[httpx2.Response]]
"""Opens a stream of the file of this name from this byte on."""


class Stopped(Exception):
    """Somebody asked for the end; what arrived is kept."""


class WrongAnswer(Exception):
    """A server's answer that cannot be the file; says what was found and wanted."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: `digest` in hex is its sha256, or git's SHA-1 of it as a blob."""

    name: str
    nbytes: int
    digest: str

    def new_hash(self) -> Any:
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.nbytes, usedforsecurity=False)


@dataclass
class Watch:
    """What the threads of one fetch share. Each writes only the counts of the file that it has at hand."""

    stop: threading.Event = field(default_factory=threading.Event)
    done: dict[str, int] = field(default_factory=dict)  # bytes of a file that are on the disk
    received: dict[str, int] = field(default_factory=dict)  # bytes of it that came over the network
    trouble: str = ""  # why nothing arrives right now

    def check(self) -> None:
        """Raises Stopped."""
        if self.stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Raises Stopped."""
        self.stop.wait(seconds)
        self.check()


class Download:
    """`file` on its way into the open file `out`, which keeps what arrived however this ends."""

    def __init__(self, file: RemoteFile, out: BinaryIO, request: Request, watch: Watch):
        self._file, self._out, self._request, self._watch = file, out, request, watch
        self._hash = file.new_hash()
        self._position = self._best = 0
        self._since = time.monotonic()  # when the last new byte came

    def run(self) -> None:
        """Returns when `out` holds the whole file. Raises Stopped, WrongAnswer, OSError, and httpx2's own."""
        self._take_stock()
        pause, mismatches = FIRST_PAUSE, 0
        while True:
            best = self._best
            try:
                self._receive()
                if self._hash.hexdigest() == self._file.digest:
                    return
                self._restart()
                mismatches += 1
                if mismatches > 1:
                    raise _wrong_hash(self._file)
            except (HfHubHTTPError, httpx2.RequestError, WrongAnswer) as error:
                pause = FIRST_PAUSE if self._best > best else 2 * pause
                self._bear(error, pause, hopeless=mismatches > 1)

    def _take_stock(self) -> None:
        """Count and hash what an earlier run left."""
        self._out.seek(0)
        while chunk := self._out.read(READ_NBYTES):
            self._watch.check()
            if self._position + len(chunk) > self._file.nbytes:
                self._restart()
                return
            self._count(chunk)
        self._best, self._since = self._position, time.monotonic()

    def _receive(self) -> None:
        """All that is missing, in one request."""
        if self._position == self._file.nbytes:
            return
        with self._request(self._file.name, self._position) as response:
            self._check_answer(response)
            for chunk in response.iter_bytes():
                self._watch.check()
                self._keep(chunk)
        if self._position < self._file.nbytes:
            raise WrongAnswer(f"{self._file.name} ended {self._file.nbytes - self._position:,} bytes early")

    def _check_answer(self, response: httpx2.Response) -> None:
        """Raises WrongAnswer and HfHubHTTPError."""
        if response.status_code == 416:
            self._restart()
            raise WrongAnswer(f"the server refuses a part of {self._file.name}")
        hf_raise_for_status(response)
        if response.status_code != 206:
            self._restart()  # a server that knows no ranges sends everything
        elif not self._is_rest(response.headers.get("content-range", "")):
            raise WrongAnswer(f"the server sent another part of {self._file.name} than it was asked for")
        missing = self._file.nbytes - self._position
        length = response.headers.get("content-length")
        if length != str(missing) and length is not None and "content-encoding" not in response.headers:
            raise WrongAnswer(f"{self._file.name} has {length} bytes to come, wanted {missing}")

    def _is_rest(self, content_range: str) -> bool:
        found = CONTENT_RANGE.fullmatch(content_range)
        return (
            found is not None
            and int(found[1]) == self._position
            and found[2] in ("*", str(self._file.nbytes))
        )

    def _keep(self, chunk: bytes) -> None:
        if self._position + len(chunk) > self._file.nbytes:
            raise WrongAnswer(f"{self._file.name} is longer than the {self._file.nbytes:,} bytes listed")
        self._out.write(chunk)
        self._count(chunk)
        self._watch.received[self._file.name] = self._watch.received.get(self._file.name, 0) + len(chunk)
        self._watch.trouble = ""
        if self._position > self._best:
            self._best, self._since = self._position, time.monotonic()

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._position += len(chunk)
        self._watch.done[self._file.name] = self._position

    def _restart(self) -> None:
        self._out.seek(0)
        self._out.truncate()
        self._hash, self._position = self._file.new_hash(), 0
        self._watch.done[self._file.name] = 0

    def _bear(self, error: Exception, pause: float, *, hopeless: bool) -> None:
        """Wait before another try; raises `error` where none is worth it."""
        lost = isinstance(error, httpx2.RequestError)
        limit = LOST_SECONDS if lost and self._watch.received else REFUSED_SECONDS
        pause = retry_after(error) or pause
        if hopeless or not passing(error) or time.monotonic() + pause > self._since + limit:
            raise error
        self._watch.trouble = "no connection" if lost else "the server is in trouble"
        self._watch.pause(pause)


def passing(error: Exception) -> bool:
    """Whether another try may go better."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in PASSING


def retry_after(error: Exception) -> int:
    """Seconds that the server wants to be left alone for; 0 where it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return 0
    value = error.response.headers.get("retry-after", "")
    return min(int(value), 10**6) if re.fullmatch(r"[0-9]{1,9}", value) else 0


def matches(path: Path, file: RemoteFile, watch: Watch) -> bool:
    """Whether the file at `path` is `file`, byte for byte; counts as it goes. Raises Stopped, OSError."""
    if not path.is_file() or path.stat().st_size != file.nbytes:
        return False
    digest = file.new_hash()
    with path.open("rb") as data:
        while chunk := data.read(READ_NBYTES):
            watch.check()
            digest.update(chunk)
            watch.done[file.name] = watch.done.get(file.name, 0) + len(chunk)
    same = digest.hexdigest() == file.digest
    watch.done[file.name] = file.nbytes if same else 0
    return same


@contextmanager
def locked(path: Path, watch: Watch) -> Iterator[None]:
    """Alone with what `path` stands for, among processes and threads. Raises Stopped, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while not _lock(file.fileno()):
            watch.trouble = "waiting for another process that fetches the same"
            watch.pause(LOCK_PAUSE)
        yield


def _lock(descriptor: int) -> bool:
    """False while somebody else has it. A disk that knows no locks counts as had by nobody."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def settle(out: BinaryIO, path: Path) -> None:
    """Give the finished file its name once its bytes are on the disk. Raises OSError."""
    out.flush()
    os.fsync(out.fileno())
    Path(out.name).replace(path)  # not `whole_file`: a rerun resumes a part by its name


def _wrong_hash(file: RemoteFile) -> WrongAnswer:
    kind = "sha256" if len(file.digest) == 64 else "git hash"
    return WrongAnswer(f"{file.name} arrived twice with another {kind} than the hub lists ({file.digest})")
