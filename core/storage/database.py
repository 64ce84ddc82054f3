"""One SQLite file: its permissions, its schema version, and transactions that wait for other processes.

Owns locks, retries and the error message for every SQLite failure. Refuses a file that is damaged, was
written by a newer version or belongs to another program; it checks this read-only, before the first write.
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

LOCK_TIMEOUT_SECONDS = 30.0
MAX_CHECKED_NBYTES = 64 << 20  # the integrity check reads the whole file, about 1 ms per MB
SYNCHRONOUS = "FULL"  # committed data survives a power failure
MIN_NBYTES = 512  # SQLite treats a shorter file as new and would overwrite it
Execute = Callable[..., sqlite3.Cursor]
T = TypeVar("T")
Migrations = Sequence[Sequence[str]]


class Database:
    """An open SQLite file. Any thread may use it; calls are serialized."""

    def __init__(self, path: Path, application_id: int, migrations: Migrations):
        """Create or open `path` and migrate its schema.

        `application_id` marks the file as qchat's. Each migration is a sequence of statements; the schema
        version is the number of migrations applied. Raises StoreError.
        """
        self.path = path.absolute()
        self._lock = threading.RLock()
        with _translate_errors(self.path):
            _create_private(self.path)
            _check_usable(self.path, application_id, len(migrations))
            self._connection = _connect(str(self.path))
            try:
                self._set_up(application_id, migrations)
            except BaseException:
                self._connection.close()
                raise

    def read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Run a query and return its rows. Raises StoreError."""
        with self._lock, _translate_errors(self.path):
            return _retry_while_locked(lambda: self._connection.execute(sql, values).fetchall())

    @contextmanager
    def write(self) -> Iterator[Execute]:
        """Run a transaction: commit at the end of the block, roll back on an error. Raises StoreError."""
        with self._lock, _translate_errors(self.path):
            execute = self._connection.execute
            _retry_while_locked(lambda: execute("BEGIN IMMEDIATE"))
            try:
                yield lambda sql, *values: execute(sql, values)
                _retry_while_locked(lambda: execute("COMMIT"))
            finally:
                if self._connection.in_transaction:
                    execute("ROLLBACK")

    def define_function(self, name: str, function: Callable[..., str | None], arguments: int) -> None:
        """Let queries call `function`, of so many `arguments`, as `name`."""
        self._connection.create_function(name, arguments, function, deterministic=True)

    def shrink_log(self) -> None:
        """Move the write-ahead log into the file and truncate it, unless another process is reading it."""
        self.read("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        with self._lock, _translate_errors(self.path):
            self._connection.close()

    def _set_up(self, application_id: int, migrations: Migrations) -> None:
        self.read("PRAGMA journal_mode = WAL")
        self.read(f"PRAGMA synchronous = {SYNCHRONOUS}")
        self.read("PRAGMA foreign_keys = ON")
        self.read("PRAGMA secure_delete = ON")  # overwrites deleted text
        if self._version() == len(migrations):
            return
        with self.write() as execute:
            for statements in migrations[self._version() :]:  # another process may have migrated meanwhile
                for statement in statements:
                    execute(statement)
            execute(f"PRAGMA application_id = {application_id}")
            execute(f"PRAGMA user_version = {len(migrations)}")

    def _version(self) -> int:
        return self.read("PRAGMA user_version")[0][0]


def _connect(address: str, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(address, timeout=5, isolation_level=None, check_same_thread=False, uri=uri)
    connection.row_factory = sqlite3.Row
    connection.text_factory = _decode  # one damaged text would fail the whole query
    return connection


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _create_private(path: Path) -> None:
    """Create the file and its folder if missing, accessible to this user only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        # do not open it here: closing it would drop the locks that SQLite holds for this process
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"cannot store conversations in {path}: it is not a regular file") from None
        if stat.S_IMODE(status.st_mode) & 0o077:
            path.chmod(0o600)


def _check_usable(path: Path, application_id: int, version: int) -> None:
    """Raise StoreError, or an SQLite error, for a file that must not be written to."""
    size = path.stat().st_size
    if not size and _nbytes(f"{path}-wal"):
        raise StoreError(f"{path} was truncated: it is empty but its log is not; nothing was changed")
    if not size or _nbytes(f"{path}-journal"):  # new, or SQLite must roll it back first
        return
    if size < MIN_NBYTES:
        raise sqlite3.DatabaseError(f"it has only {size} bytes")
    with closing(_connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:

        def value(sql: str) -> Any:
            return _retry_while_locked(lambda: connection.execute(sql).fetchone()[0])

        found = value("PRAGMA application_id")
        if found != application_id and (found or value("SELECT count(*) FROM sqlite_master")):
            raise StoreError(f"{path} is a database of another program; nothing was changed")
        newer = value("PRAGMA user_version")
        if newer > version:
            raise StoreError(
                f"{path} was written by a newer qchat (schema {newer}, not {version}): update qchat"
            )
        problem = value("PRAGMA quick_check(1)") if size <= MAX_CHECKED_NBYTES else "ok"
        if problem != "ok":
            raise sqlite3.DatabaseError(" ".join(problem.split()))


def _nbytes(path: str) -> int:
    return Path(path).stat().st_size if Path(path).exists() else 0


def _retry_while_locked(action: Callable[[], T]) -> T:
    """Return the result of `action`, retried while another process holds the lock.

    SQLite's own busy timeout does not cover every case.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
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
    return getattr(problem, "sqlite_errorcode", 0) & 0xFF  # the higher bits are the extended code


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Raise SQLite and system errors as StoreError."""
    try:
        yield
    except OSError as problem:
        raise StoreError(f"cannot store conversations in {path}: {problem.strerror or problem}") from problem
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as problem:
        if _is_locked(problem):
            raise StoreError(
                f"another program has locked {path} for {LOCK_TIMEOUT_SECONDS:.0f} s: close it and try again"
            ) from problem
        raise StoreError(f"cannot access the conversations in {path}: {problem}") from problem
    except (sqlite3.IntegrityError, OverflowError) as problem:
        raise StoreError(f"{path} rejected the data: {problem}") from problem
    except (sqlite3.DatabaseError, UnicodeDecodeError) as problem:  # a damaged schema may not decode
        raise StoreError(
            f"{path} is damaged ({problem}); nothing was changed: move it away or restore a backup"
        ) from problem
