"""A cache of compiled CUDA kernels on disk: MLX itself compiles custom kernels anew in every process.

NVRTC, which MLX's CUDA wheel loads, compiles a text once per architecture; later processes read the result.
Where NVRTC is missing or refuses the text, there is no machine code, and MLX compiles the text itself.

MLX hashes the machine code of each launch, so it is kept as nvFatbin compresses it, to less than a third.
"""

import ctypes
import hashlib
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from ..machine.backend import mx
from ..machine.files import cache_path, write_whole

# numbered by CUDA's major version
NVRTC = ("libnvrtc.so.13", "libnvrtc.so.12")
ELF, FATBIN = b"\x7fELF", b"\x50\xed\x55\xba"
NVFATBIN = "libnvfatbin.so.13"


def machine_code(source: str, name: str, architecture: str) -> bytes | None:
    """Return `source` compiled for an architecture such as `sm_90`; None where NVRTC cannot.

    `name` is the source's one function and unique to it.
    """
    file = _file(name, architecture)
    if file is not None:
        try:
            kept = file.read_bytes()
        except OSError:
            kept = b""
        if kept.startswith((ELF, FATBIN)):
            return kept
    made = _compile(source, name, architecture)
    if made is None:
        return None
    made = compress(made, architecture)
    if file is not None:
        _keep(file, made)
    return made


def compress(code: bytes, architecture: str) -> bytes:
    """Return a fat binary of `code`, compressed; `code` itself where nvFatbin is missing or refuses it."""
    library = _nvfatbin()
    if library is None:
        return code
    fatbin, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * 2)(b"-64", b"-compress-mode=size")
    if library.nvFatbinCreate(ctypes.byref(fatbin), options, ctypes.c_size_t(len(options))):
        return code
    try:
        number = architecture.removeprefix("sm_").encode()
        if library.nvFatbinAddCubin(fatbin, code, ctypes.c_size_t(len(code)), number, b"qchat"):
            return code
        if library.nvFatbinSize(fatbin, ctypes.byref(size)):
            return code
        made = ctypes.create_string_buffer(size.value)
        return code if library.nvFatbinGet(fatbin, made) else made.raw
    finally:
        library.nvFatbinDestroy(ctypes.byref(fatbin))


def unique_name(stem: str, *texts: str) -> str:
    """Return a C identifier that begins with `stem` and is the same for equal texts only."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return f"{stem}_{digest[:12]}"


def _file(name: str, architecture: str) -> Path | None:
    folder = cache_path("kernels")
    ending = "cubin" if _nvfatbin() is None else "fatbin"
    return folder / f"{name}-{architecture}-nvrtc{compiler_version()}.{ending}" if folder else None


def _keep(file: Path, content: bytes) -> None:
    """Write the file whole or not at all, as other processes read it. A full disk only costs time."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(file, content)


def compiler_version() -> str:
    """Return the version of the NVRTC that MLX has loaded; "none" without one."""
    nvrtc = _nvrtc()
    if nvrtc is None:
        return "none"
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def _nvrtc() -> ctypes.CDLL | None:
    """Return the NVRTC that MLX's library has loaded, and no other."""
    if sys.platform != "linux":
        return None
    for name in NVRTC:
        with suppress(OSError):
            return ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    return None


@cache
def _nvfatbin() -> ctypes.CDLL | None:
    """Return nvFatbin from its wheel, which puts it beside MLX's CUDA libraries."""
    for folder in sorted(Path(mx.__file__).parent.parent.glob("nvidia/*/lib"), reverse=True):
        with suppress(OSError):
            return ctypes.CDLL(str(folder / NVFATBIN))
    return None


@cache
def _includes() -> list[Path]:
    """Return the folders of CUDA's headers and of those they include from MLX's wheel; empty if not found."""
    package = Path(mx.__file__).parent
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += sorted(package.parent.glob("nvidia/cu1?"), reverse=True)
    homes += [package.parent / "nvidia/cuda_runtime", Path("/usr/local/cuda")]
    found = next((home / "include" for home in homes if (home / "include/cuda_fp16.h").exists()), None)
    return [] if found is None else [found, package / "include/cccl", found / "cccl"]


def _compile(source: str, name: str, architecture: str) -> bytes | None:
    """Return the machine code of `source`; None without NVRTC or headers, or where it does not compile."""
    nvrtc = _nvrtc()
    if nvrtc is None or not _includes():
        return None
    program = ctypes.c_void_p()
    options = [f"--gpu-architecture={architecture}", *(f"--include-path={path}" for path in _includes())]
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None):
        return None
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), words):
            return None
        size = ctypes.c_size_t()
        if nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)):
            return None
        code = ctypes.create_string_buffer(size.value)
        return None if nvrtc.nvrtcGetCUBIN(program, code) else code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
