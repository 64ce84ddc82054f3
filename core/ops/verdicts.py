"""Results of contests on disk: a private file of JSON lines for each device, MLX version, text and shape.

A line says that a form is about to be tried, or what came of it. So a form that was tried last and has no
result is known to have ended its process, and is not tried again.
"""

import fcntl
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..kernels.compile_cache import compiler_version
from ..kernels.launch import may_try
from ..machine.backend import cache_path, mx
from ..machine.fusion import kernel_home
from . import choices
from .candidates import Dimensions

MAX_NBYTES = 1 << 20
# another form must be this much faster than the usual one: a race takes milliseconds, and is noisy
ADVANTAGE = 0.95
ENDED = "it ended its process or did not return"
SOURCES = ("ops", "kernels")
# MLX's operations are used anyway, and on CUDA compile for seconds: only our kernels must return at once
PATIENT_SECONDS = 60.0


@dataclass(frozen=True)
class Result:
    """What came of one form of one operation; `failure` is empty where the form may be used."""

    operation: str
    shape: str
    form: str
    limit: float
    error: float | None = None
    seconds: float | None = None
    failure: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.operation, self.shape, self.form

    @property
    def passed(self) -> bool:
        return not self.failure and self.seconds is not None


class Record:
    """The file of one model's contests."""

    def __init__(self, path: Path):
        self.path, self._lock_path = path, path.with_suffix(".lock")

    @classmethod
    def of(cls, dimensions: Dimensions) -> "Record":
        """Find the record of these dimensions on this device, by this code.

        It lasts as long as this process where there is no private cache folder.
        """
        home = kernel_home(cache_path("verdicts")) or Path(_temporary_home().name)
        return cls(home / f"{_digest(dimensions)}.jsonl")

    def results(self, *, racing: bool | None = None) -> list[Result]:
        """Return the results so far. A form that was begun and has none has failed, unless it is `racing`.

        By default that is found out.
        """
        racing = self.racing if racing is None else racing
        found: dict[tuple[str, str, str], Result] = {}
        for line in self._read():
            if result := _parse(line):
                found[result.key] = result
        return [one for one in found.values() if one.failure != ENDED or not racing]

    @property
    def complete(self) -> bool:
        """Whether all contests are over."""
        return any("complete" in line for line in self._read())

    @property
    def racing(self) -> bool:
        """Whether a process is holding the contests right now."""
        with suppress(OSError), self._lock_path.open("r") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the contests alone; gives False where another process does."""
        with self._lock_path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @property
    def current(self) -> str | None:
        """Return the form that is being tried, if a race is on."""
        last = next(reversed(self._read()), {})
        return last.get("form") if last.get("failure") == ENDED else None

    def begin(self, result: Result) -> None:
        """Note that the form of `result` is about to be tried; until another note it counts as failed."""
        self._append({**asdict(result), "failure": ENDED})

    def add(self, result: Result) -> None:
        self._append(asdict(result))

    def end(self) -> None:
        """Note that all contests are over."""
        self._append({"complete": True})

    def _append(self, line: Mapping[str, Any]) -> None:
        """Write one line at once, so that it is whole or the last one. Raises OSError."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        try:
            with self.path.open(encoding="utf-8", errors="replace") as file:
                lines = file.read(MAX_NBYTES).splitlines()
        except OSError:
            return []
        return [line for text in lines if (line := _decode(text))]


def winners(results: Iterable[Result]) -> dict[choices.Key, str]:
    """Return the fastest form of each operation and shape that passed; the usual one unless it is beaten."""
    contests: dict[choices.Key, list[Result]] = {}
    for result in results:
        contests.setdefault((result.operation, result.shape), []).append(result)
    found = {key: _winner(forms) for key, forms in contests.items()}
    return {key: form for key, form in found.items() if form is not None}


def limit_of(form: str | None, limit_seconds: float) -> float:
    """Return the seconds in which a form must return, given those for a kernel of ours."""
    return max(limit_seconds, PATIENT_SECONDS) if form in ("mlx", "chunked") else limit_seconds


def _winner(forms: list[Result]) -> str | None:
    """Return the form to use; None while only one was tried, or where none passed."""
    passed = [form for form in forms if form.passed]
    if len(forms) < 2 or not passed:
        return None
    fastest = min(passed, key=lambda form: form.seconds or 0.0)
    usual = forms[0]
    close = usual.passed and (fastest.seconds or 0.0) > ADVANTAGE * (usual.seconds or 0.0)
    return usual.form if close else fastest.form


@cache
def _temporary_home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qchat-verdicts-")


def _decode(text: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        line = json.loads(text)
        return line if isinstance(line, dict) else None
    return None


def _parse(line: Mapping[str, Any]) -> Result | None:
    """Return the result in a line; None for another line, also a damaged one."""
    names = {field.name for field in fields(Result)}
    numbers = [line.get(name) for name in ("error", "seconds")]
    texts = [line.get(name) for name in ("operation", "shape", "form", "failure")]
    if not line.keys() <= names or not all(isinstance(text, str) for text in texts):
        return None
    if not all(number is None or isinstance(number, int | float) for number in numbers):
        return None
    return Result(**line) if isinstance(line.get("limit"), float) else None


def _digest(dimensions: Dimensions) -> str:
    device, core = mx.device_info(), Path(__file__).parents[1]
    files = [path for name in SOURCES for path in sorted((core / name).glob("*.py"))]
    about = [version("mlx"), str(device.get("device_name")), str(device.get("architecture"))]
    about += [str(may_try()), json.dumps(dimensions.as_json())]
    about += [compiler_version()] if may_try() == "cuda" else []
    code = hashlib.sha256("\0".join(about).encode())
    for path in files:
        code.update(path.read_bytes())
    return code.hexdigest()[:16]
