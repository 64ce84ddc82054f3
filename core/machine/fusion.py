"""Functions in two forms, plain and fused by MLX's compiler, and the folder of kernels behind the fused one.

On a CPU MLX calls g++, half a second for each kernel, when a fused function is first evaluated. No reply
waits for that: a function runs plain until its kernels are loaded. `engine.precompile` compiles them in a
child process, into a private folder: other users may write to MLX's own place, the temporary folder.
QCHAT_COMPILE is `auto`, `off` (always plain) or `on` (compile while loading a model, and wait).
"""

import ctypes
import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UsageError
from .files import write_whole

F = TypeVar("F", bound=Callable)
# functions choose between forms of an exponential by the number of values
MANY_VALUES = 512
# up to so many rows projections share one product, whose parts are views of it
FEW_ROWS = 8
RETRY_SECONDS = 86_400.0
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

_ready: set[object] = set()
_recorder: int | None = None  # the thread that is loading kernels
_inside = False  # a fused function, which calls others


def choice() -> str:
    """The value of QCHAT_COMPILE. Raises UsageError for an unknown one."""
    value = os.environ.get("QCHAT_COMPILE", "auto")
    if value not in ("auto", "on", "off"):
        raise UsageError(f"QCHAT_COMPILE is {value!r}, wanted auto, on, off")
    return value


def has_compiler() -> bool:
    """Whether MLX would find the compiler it calls."""
    return shutil.which("g++") is not None


class Fused:
    """A function of arrays that runs fused for kinds of arguments whose kernels are loaded, else plain."""

    def __init__(self, function: Callable[..., Any], compiler: Callable[[Any], Any]):
        self._plain, self._fused = function, compiler(function)
        self._owner = getattr(function, "__self__", None)
        self._name = getattr(getattr(function, "__func__", function), "__qualname__", repr(function))
        self._form: object = None

    def __call__(self, *arrays: Any) -> Any:
        global _inside
        if _inside or not (_ready or _recorder):
            return self._plain(*arrays)
        kind = self._kind(arrays)
        if _recorder == threading.get_ident():
            _ready.add(kind)
        if kind not in _ready:
            return self._plain(*arrays)
        _inside = True
        try:
            return self._fused(*arrays)
        finally:
            _inside = False

    def _kind(self, arrays: tuple[Any, ...]) -> object:
        """What decides which kernels MLX needs: the graph, and dtypes, axes and lengths of the arguments."""
        if self._form is None:
            self._form = (self._name, form_of(self._owner))
        shapes = [(x.dtype, x.size >= MANY_VALUES, *map(_length_class, x.shape)) for x in arrays]
        return self._form, tuple(shapes)


def _length_class(length: int) -> int:
    return (length > 1) + (length > FEW_ROWS)


def form_of(value: Any) -> object:
    """A layer without its numbers: equal forms make equal graphs."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, list | tuple):
        return tuple(form_of(item) for item in value)
    if isinstance(value, Fused):
        return None
    if type(value).__module__.startswith("qchat.") and hasattr(value, "__dict__"):
        return type(value).__name__, *((name, form_of(part)) for name, part in sorted(vars(value).items()))
    return value if isinstance(value, str | int | float | None) else type(value).__name__


@contextmanager
def loading(kernels: Path) -> Iterator[None]:
    """Evaluate functions with MLX's kernels in `kernels`; from then on they run fused for such arguments.

    MLX compiles what it does not find there, now and later: it never looks into a shared folder again.
    """
    global _recorder
    _set_temporary_folder(kernels)
    _recorder = threading.get_ident()
    try:
        yield
    finally:
        _recorder = None


def _set_temporary_folder(folder: Path) -> None:
    """Change TMPDIR for C code such as MLX's; `os.environ` and `tempfile` do not notice."""
    tempfile.gettempdir()  # Python asks once
    if ctypes.CDLL(None).setenv(b"TMPDIR", os.fsencode(folder), 1):
        raise OSError(f"TMPDIR cannot be set to {folder}")


def forget() -> None:
    """Run everything plain again."""
    _ready.clear()


def kernel_home(base: Path | None) -> Path | None:
    """The folder of compiled kernels in the cache `base`, or None if others can write to it."""
    if base is None:
        return None
    try:
        home = base.resolve() / f"{_mlx_version()}-{platform.machine()}"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return None
    return home if is_private(home) else None


def is_private(folder: Path) -> bool:
    """Whether nobody but this user and root can put files into `folder`, or replace a folder above it."""
    mine = {0, os.geteuid()}
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in mine or found.st_mode & OTHERS_MAY_WRITE:
        return False
    above = [parent.stat() for parent in folder.parents]
    return all(
        one.st_uid in mine and (not one.st_mode & OTHERS_MAY_WRITE or one.st_mode & stat.S_ISVTX)
        for one in above
    )


class Kernels:
    """The kernels of one kind of model in `home`, which all models share, and their record."""

    def __init__(self, home: Path, identity: str):
        """`identity` says what the kernels depend on."""
        self.home = home
        self._record = home / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"

    @property
    def folder(self) -> Path:
        """Where MLX looks below its temporary folder `home`."""
        return mlx_folder(self.home)

    def layers(self) -> list[int] | None:
        """The numbers of the layers that stand for all others; None until their kernels are compiled."""
        record = self._read()
        files = record.get("files", [])
        folder = self.folder
        complete = bool(files) and all((folder / name).exists() for name in files)
        return record["layers"] if complete else None

    def failed_lately(self) -> bool:
        """Whether an attempt to compile them failed within a day."""
        return time.time() - self._read().get("failed", 0.0) < RETRY_SECONDS

    def keep(self, made: Path, layers: list[int]) -> None:
        """Take over the kernels below MLX's temporary folder `made`, compiled for these layers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = sorted(mlx_folder(made).glob("*.so"))
        for file in files:
            if not (self.folder / file.name).exists():
                file.replace(self.folder / file.name)
        self._write({"layers": layers, "files": [file.name for file in files]})

    def note_failure(self) -> None:
        self._write({"failed": time.time()})

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._record.read_bytes())
        except (OSError, ValueError):
            return {}

    def _write(self, record: dict[str, Any]) -> None:
        write_whole(self._record, json.dumps(record))


def mlx_folder(temporary: Path) -> Path:
    """Where MLX keeps CPU kernels in a temporary folder."""
    return temporary / "mlx" / _mlx_version() / "cpu"


@cache
def _mlx_version() -> str:
    return version("mlx")
