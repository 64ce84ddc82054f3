"""One SQLite file: who may read it, its schema version, and transactions that wait for other processes.

Owns locks, retries and the sentence for every way that SQLite fails. Refuses a file that is damaged, of a
newer version or of another program, which a read-only connection finds out before anything is written.
"""

import os
import random
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..errors import StoreError

PATIENCE_SECONDS = 30.0
MAX_CHECKED_NBYTES = 64 << 20  # a check reads the whole file, about a millisecond for each million bytes
SYNCHRONOUS = "FULL"  # what was committed also survives a loss of power
MIN_NBYTES = 512  # SQLite takes less for a new file and would write over it
Execute = Callable[..., sqlite3.Cursor]
T = TypeVar("T")
Migrations = Sequence[Sequence[str]]


class Database:
    """An open file, usable from any thread, one at a time."""

    def __init__(self, path: Path, application_id: int, migrations: Migrations):
        """Make or open `path` and bring its schema up to date.

        `application_id` marks the file as ours; the schema's version is the number of `migrations` done, each
        a sequence of statements. Raises StoreError.
        """
        self.path = path.absolute()
        self._lock = threading.RLock()
        with _explained(self.path):
            _make_private(self.path)
            _examine(self.path, application_id, len(migrations))
            self._connection = _connect(str(self.path))
            try:
                self._prepare(application_id, migrations)
            except BaseException:
                self._connection.close()
                raise

    def read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of one query. Raises StoreError."""
        with self._lock, _explained(self.path):
            return _patiently(lambda: self._connection.execute(sql, values).fetchall())

    @contextmanager
    def write(self) -> Iterator[Execute]:
        """A transaction: all of it is done or nothing. Raises StoreError."""
        with self._lock, _explained(self.path):
            execute = self._connection.execute
            _patiently(lambda: execute("BEGIN IMMEDIATE"))
            try:
                yield lambda sql, *values: execute(sql, values)
                _patiently(lambda: execute("COMMIT"))
            finally:
                if self._connection.in_transaction:
                    execute("ROLLBACK")

    def define(self, name: str, function: Callable[[str, str], str | None]) -> None:
        """Make `function` known to queries as `name`."""
        self._connection.create_function(name, 2, function, deterministic=True)

    def shrink_log(self) -> None:
        """Move the log into the file and empty it, unless another process is reading it."""
        self.read("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        with self._lock, _explained(self.path):
            self._connection.close()

    def _prepare(self, application_id: int, migrations: Migrations) -> None:
        self.read("PRAGMA journal_mode = WAL")
        self.read(f"PRAGMA synchronous = {SYNCHRONOUS}")
        self.read("PRAGMA foreign_keys = ON")
        self.read("PRAGMA secure_delete = ON")  # deleted text is overwritten
        if self._version() == len(migrations):
            return
        with self.write() as execute:
            for statements in migrations[self._version() :]:  # another process may have been first
                for statement in statements:
                    execute(statement)
            execute(f"PRAGMA application_id = {application_id}")
            execute(f"PRAGMA user_version = {len(migrations)}")

    def _version(self) -> int:
        return self.read("PRAGMA user_version")[0][0]


def _connect(address: str, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(address, timeout=5, isolation_level=None, check_same_thread=False, uri=uri)
    connection.row_factory = sqlite3.Row
    return connection


def _make_private(path: Path) -> None:
    """Make the file, and its folder where there is none, for this user only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        # never opened here: closing it would drop the locks that this process holds through SQLite
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{path} is not a regular file, conversations cannot be kept in it") from None
        if stat.S_IMODE(status.st_mode) & 0o077:
            path.chmod(0o600)


def _examine(path: Path, application_id: int, version: int) -> None:
    """Raises StoreError for a file that must not be written to."""
    size = path.stat().st_size
    if not size and _nbytes(f"{path}-wal"):
        raise StoreError(f"{path} is empty but its log is not: it was cut off, and nothing was changed")
    if not size or _nbytes(f"{path}-journal"):  # new, or to be rolled back before it can be read
        return
    if size < MIN_NBYTES:
        raise sqlite3.DatabaseError(f"it has only {size} bytes")
    with closing(_connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:

        def value(sql: str) -> Any:
            return _patiently(lambda: connection.execute(sql).fetchone()[0])

        found = value("PRAGMA application_id")
        if found != application_id and (found or value("SELECT count(*) FROM sqlite_master")):
            raise StoreError(f"{path} is a database of another program, nothing was changed")
        newer = value("PRAGMA user_version")
        if newer > version:
            raise StoreError(
                f"{path} was written by a newer qchat (schema {newer}, this is {version}): update qchat"
            )
        problem = value("PRAGMA quick_check(1)") if size <= MAX_CHECKED_NBYTES else "ok"
        if problem != "ok":
            raise sqlite3.DatabaseError(" ".join(problem.split()))


def _nbytes(path: str) -> int:
    return Path(path).stat().st_size if Path(path).exists() else 0


def _patiently(action: Callable[[], T]) -> T:
    """Its result, tried again while another process holds the lock; SQLite's own waiting has exceptions."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return action()
        except sqlite3.OperationalError as problem:
            if not _is_locked(problem) or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.005, 0.05))


def _is_locked(problem: sqlite3.Error) -> bool:
    return _code(problem) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(problem: sqlite3.Error) -> int:
    return getattr(problem, "sqlite_errorcode", 0) & 0xFF  # the higher bits say more precisely where


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what SQLite and the system raise into a StoreError."""
    try:
        yield
    except OSError as problem:
        raise StoreError(f"cannot keep conversations in {path}: {problem.strerror or problem}") from problem
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as problem:
        if _is_locked(problem):
            raise StoreError(
                f"another program has kept {path} locked for {PATIENCE_SECONDS:.0f} s: close it and try again"
            ) from problem
        raise StoreError(f"cannot use the conversations in {path}: {problem}") from problem
    except (sqlite3.IntegrityError, OverflowError) as problem:
        raise StoreError(f"{path} does not take this: {problem}") from problem
    except (sqlite3.DatabaseError, UnicodeDecodeError) as problem:  # damaged names are in no encoding
        raise StoreError(
            f"{path} is damaged ({problem}): nothing was changed, move it away or put a copy in its place"
        ) from problem
