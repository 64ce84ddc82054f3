"""Runs a kernel's text on this machine's CPU, Metal's or CUDA's, with g++ and a shim under it."""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from qchat.core.kernels.launch import Backend, Kernel, texts
from qchat.core.machine.backend import mx

HERE = Path(__file__).parent
TYPES = {
    mx.bfloat16: "bfloat",
    mx.float32: "float",
    mx.uint32: "uint",
    mx.uint8: "uint8_t",
    mx.int32: "int",
}
_folder = tempfile.TemporaryDirectory(prefix="qchat-kernels-")

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def run(
    kernel: Kernel,
    arrays: Sequence[mx.array],
    *,
    backend: Backend = "metal",
    blocks: tuple[int, int, int],
    results: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> list[mx.array]:
    """As `Kernel.__call__`, one thread after the other."""
    source = _program(kernel, backend, [a.dtype for a in arrays], [dtype for _, dtype in results])
    inputs = [np.ascontiguousarray(_plain(array)) for array in arrays]
    outputs = [np.full(shape, 0xA5, np.uint8) for shape in (_nbytes(*result) for result in results)]
    shapes = [np.array(array.shape, np.int32) for array in arrays]
    pointers = [a.ctypes.data for a in (*inputs, *outputs, *shapes)]
    _library(source).run((ctypes.c_void_p * len(pointers))(*pointers), *blocks, kernel.threads)
    return [_typed(output, *result) for output, result in zip(outputs, results, strict=True)]


def run_at(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    outputs: Sequence[mx.array],
    places: Sequence[int],
    blocks: tuple[int, int, int],
) -> None:
    """Run on the memory at `places`, as CUDA; the arrays only tell dtypes and shapes."""
    source = _program(kernel, "cuda", [a.dtype for a in inputs], [a.dtype for a in outputs])
    source = f"#define FOUR_ALIGNMENT 8  // as MLX allocates on a CPU\n{source}"
    shapes = [np.array(array.shape, np.int32) for array in inputs]
    pointers = [*places, *(shape.ctypes.data for shape in shapes)]
    _library(source).run((ctypes.c_void_p * len(pointers))(*pointers), *blocks, kernel.threads)


def _plain(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _nbytes(shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    return int(np.prod(shape)) * dtype.size


def _typed(raw: np.ndarray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(raw).view(dtype).reshape(shape)


def _program(
    kernel: Kernel, backend: Backend, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype]
) -> str:
    """The function that MLX would write around the body, and an entry for ctypes."""
    header, body = texts(kernel, backend)
    types = [f"const {TYPES[dtype]}*" for dtype in inputs] + [f"{TYPES[dtype]}*" for dtype in outputs]
    names = [*kernel.inputs, *kernel.outputs]
    for name in kernel.inputs:
        types.append("const int*")
        names.append(f"{name}_shape")
    parameters = ", ".join(f"{kind} {name}" for kind, name in zip(types, names, strict=True))
    arguments = ", ".join(f"({kind})arrays[{place}]" for place, kind in enumerate(types))
    header = re.sub(r"#include <cuda.*", "", header)
    header = re.sub(r"__device__ inline void multiply_tiles.*?\n}\n", "", header, flags=re.DOTALL)  # assembly
    return f"""#include "{HERE}/fibers.h"
#include "{HERE}/{backend}_shim.h"
{header}
static void** arrays;
void kernel_function({parameters}) {{
{body}
}}
void call() {{ kernel_function({arguments}); }}
extern "C" void run(void** given, uint x, uint y, uint z, uint threads) {{
  arrays = given;
  run_grid(x, y, z, threads, call);
}}
"""


@cache
def _library(source: str) -> ctypes.CDLL:
    base = Path(_folder.name) / hashlib.sha256(source.encode()).hexdigest()[:16]
    base.with_suffix(".cpp").write_text(source)
    command = ["g++", "-std=c++17", "-O1", "-mf16c", "-w", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(base.with_suffix(".so")), str(base.with_suffix(".cpp"))], check=True)
    library = ctypes.CDLL(str(base.with_suffix(".so")))
    library.run.argtypes = [ctypes.c_void_p] + [ctypes.c_uint] * 4
    return library
