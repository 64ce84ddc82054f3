"""Kernels whose body is written once: a prelude per backend gives Metal and CUDA one vocabulary.

Bodies may use `tid` (in their block), `lane` (of 32), `block_x`, `block_y`, `block_z`, and what the preludes
define. `backend()` says whether our kernels run on this machine's device.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, TypeVar

from ..errors import UsageError
from ..machine.backend import mx, on_gpu
from .compile_cache import machine_code, unique_name

Backend = Literal["cuda", "metal"]
T = TypeVar("T")

# What both preludes define:
#   halves                     two halves in one register, whose product costs as much as one float's
#   low_float, high_float      the bfloat16 in the lower, upper half of 32 bits; float_pair makes such bits
#   exact_cos, exact_sin       accurate for angles of thousands of turns, too
#   picked<a, b, c, d>(v, w)   the bytes a, b, c, d of the eight in v and w, 0 being the lowest
#   WAIT_FIRST                 a kernel of a graph begins before the last one has ended, and waits for that;
#                              helpers may put BEGIN_EARLY in its place and WAIT_FOR_INPUTS into the body
#   stream2, stream4           load two, four words that no one reads again
#   lane_xor, lanes_sum        the value of the lane whose number is lane ^ mask; the sum over all 32 lanes
CUDA_PRELUDE = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
typedef unsigned int uint;
typedef unsigned short ushort;
typedef __half2 halves;
typedef __nv_bfloat16 bf16;
#define DEVICE
#define SHARED __shared__
#define UNROLL _Pragma("unroll")
#define BARRIER() __syncthreads()
#if __CUDA_ARCH__ >= 900
#define BEGIN_EARLY() asm volatile("griddepcontrol.launch_dependents;")
#define WAIT_FOR_INPUTS() asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define BEGIN_EARLY()
#define WAIT_FOR_INPUTS()
#endif
#define WAIT_FIRST() BEGIN_EARLY(); WAIT_FOR_INPUTS()
__device__ inline halves make_halves(float low, float high) { return __floats2half2_rn(low, high); }
__device__ inline halves bits_halves(uint bits) { return *reinterpret_cast<halves*>(&bits); }
__device__ inline halves halves_fma(halves a, halves b, halves c) { return __hfma2(a, b, c); }
__device__ inline float halves_low(halves p) { return __low2float(p); }
__device__ inline float halves_high(halves p) { return __high2float(p); }
__device__ inline float bits_float(uint bits) { return __uint_as_float(bits); }
__device__ inline uint float_bits(float x) { return __float_as_uint(x); }
__device__ inline float low_float(uint bits) { return __uint_as_float(bits << 16); }
__device__ inline float high_float(uint bits) { return __uint_as_float(bits & 0xffff0000u); }
__device__ inline uint float_pair(float low, float high) {
  __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint*>(&two);
}
__device__ inline float exact_cos(float x) { return cosf(x); }
__device__ inline float exact_sin(float x) { return sinf(x); }
template <int a, int b, int c, int d> __device__ inline uint picked(uint v, uint w) {
  return __byte_perm(v, w, a | b << 4 | c << 8 | d << 12);
}
__device__ inline uint2 stream2(const uint* p) { return __ldcs(reinterpret_cast<const uint2*>(p)); }
__device__ inline uint4 stream4(const uint* p) { return __ldcs(reinterpret_cast<const uint4*>(p)); }
__device__ inline float lane_xor(float x, uint mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ inline float lanes_sum(float x) {
  UNROLL for (uint mask = 16; mask > 0; mask /= 2) x += lane_xor(x, mask);
  return x;
}
"""
CUDA_OPENING = """
  WAIT_FIRST();
  const uint tid = threadIdx.x, lane = threadIdx.x % 32;
  const uint block_x = blockIdx.x, block_y = blockIdx.y, block_z = blockIdx.z;
"""
# MLX writes the function's head itself, so only a macro can limit its registers
CUDA_BOUNDS = """
#undef __global__
#define __global__ __location__(global) __launch_bounds__({}, {})
"""
METAL_PRELUDE = """
typedef half2 halves;
typedef bfloat bf16;
#define DEVICE device
#define SHARED threadgroup
#define UNROLL _Pragma("clang loop unroll(full)")
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define BEGIN_EARLY()
#define WAIT_FOR_INPUTS()
#define WAIT_FIRST()
inline halves make_halves(float low, float high) { return halves(half(low), half(high)); }
inline halves bits_halves(uint bits) { return as_type<halves>(bits); }
inline halves halves_fma(halves a, halves b, halves c) { return fma(a, b, c); }
inline float halves_low(halves p) { return float(p.x); }
inline float halves_high(halves p) { return float(p.y); }
inline float bits_float(uint bits) { return as_type<float>(bits); }
inline uint float_bits(float x) { return as_type<uint>(x); }
inline float low_float(uint bits) { return as_type<float>(bits << 16); }
inline float high_float(uint bits) { return as_type<float>(bits & 0xffff0000u); }
inline uint float_pair(float low, float high) { return as_type<uint>(bfloat2(bfloat(low), bfloat(high))); }
inline float exact_cos(float x) { return precise::cos(x); }
inline float exact_sin(float x) { return precise::sin(x); }
template <int a, int b, int c, int d> inline uint picked(uint v, uint w) {
  const uchar4 x = as_type<uchar4>(v), y = as_type<uchar4>(w);
  return as_type<uint>(uchar4(
    a < 4 ? x[a % 4] : y[a % 4], b < 4 ? x[b % 4] : y[b % 4],
    c < 4 ? x[c % 4] : y[c % 4], d < 4 ? x[d % 4] : y[d % 4]));
}
inline uint2 stream2(const device uint* p) { return *reinterpret_cast<const device uint2*>(p); }
inline uint4 stream4(const device uint* p) { return *reinterpret_cast<const device uint4*>(p); }
inline float lane_xor(float x, uint mask) { return simd_shuffle_xor(x, ushort(mask)); }
inline float lanes_sum(float x) { return simd_sum(x); }
"""
METAL_OPENING = """
  WAIT_FIRST();
  const uint tid = thread_position_in_threadgroup.x, lane = thread_position_in_threadgroup.x % 32;
  const uint block_x = threadgroup_position_in_grid.x, block_y = threadgroup_position_in_grid.y;
  const uint block_z = threadgroup_position_in_grid.z;
"""
PRELUDES: Mapping[Backend, str] = {"cuda": CUDA_PRELUDE, "metal": METAL_PRELUDE}
OPENINGS: Mapping[Backend, str] = {"cuda": CUDA_OPENING, "metal": METAL_OPENING}


@dataclass(frozen=True)
class Kernel:
    """A kernel's text, its inputs and outputs, all row-contiguous, and the `threads` of a block.

    `helpers` precede the function. CUDA's compiler lets `resident` blocks share a multiprocessor.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    threads: int
    helpers: str = ""
    resident: int = 1

    def __call__(
        self,
        arrays: Sequence[mx.array],
        *,
        blocks: tuple[int, int, int],
        results: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]:
        """Launch so many `blocks` on `arrays`; return outputs of the shapes and dtypes in `results`.

        While launches are recorded (`recorded_by`), write this one down instead.
        """
        if _recorder is not None:
            return _recorder(self, arrays, blocks, results)
        launch = {
            "inputs": list(arrays),
            "grid": (blocks[0] * self.threads, blocks[1], blocks[2]),
            "threadgroup": (self.threads, 1, 1),
            "output_shapes": [shape for shape, _ in results],
            "output_dtypes": [dtype for _, dtype in results],
        }
        device = backend() or "metal"
        if device == "cuda":
            made = cuda_code(self, arrays, launch["output_dtypes"])
            if made is not None:
                return mx.fast.precompiled_cuda_kernel(
                    name=made[0],
                    compiled_source=made[1],
                    scalars=self.lengths(arrays),
                    ensure_row_contiguous=True,
                    **launch,
                )
        return _build(self, device)(**launch)

    def lengths(self, arrays: Sequence[mx.array]) -> list[int]:
        """Return what follows the pointers in a launch on `arrays`: the lengths that the body uses."""
        return [length for _, array in self.with_shapes(arrays) for length in array.shape]

    def with_shapes(self, values: Sequence[T]) -> list[tuple[str, T]]:
        """Return the name of each input whose shape the body uses, with its one of `values`."""
        pairs = zip(self.inputs, values, strict=True)
        return [(name, value) for name, value in pairs if name in self._shaped]

    @cached_property
    def _shaped(self) -> frozenset[str]:
        return frozenset(name for name in self.inputs if f"{name}_shape" in self.body)


def texts(kernel: Kernel, backend: Backend) -> tuple[str, str]:
    """Return the text before the function and the text inside it."""
    bounds = CUDA_BOUNDS.format(kernel.threads, kernel.resident) if backend == "cuda" else ""
    return PRELUDES[backend] + kernel.helpers + bounds, OPENINGS[backend] + kernel.body


# names of dtypes in CUDA
CUDA_TYPES = {
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
    mx.uint32: "unsigned int",
    mx.uint8: "unsigned char",
    mx.int32: "int",
}


def cuda_program(
    kernel: Kernel, inputs: Sequence[tuple[mx.Dtype, int]], outputs: Sequence[mx.Dtype]
) -> tuple[str, str]:
    """Return a whole program around the kernel's body, and the name of its function, unique to this program.

    `inputs` are the dtype and the number of axes of each input. The function's last parameters are the
    lengths of the inputs whose shape the body uses.
    """
    header, body = texts(kernel, "cuda")
    parameters = [
        *(
            f"const {CUDA_TYPES[dtype]}* {name}"
            for name, (dtype, _) in zip(kernel.inputs, inputs, strict=True)
        ),
        *(f"{CUDA_TYPES[dtype]}* {name}" for name, dtype in zip(kernel.outputs, outputs, strict=True)),
    ]
    shapes = []
    for name, (_, axes) in kernel.with_shapes(inputs):
        lengths = [f"{name}_length_{axis}" for axis in range(axes)]
        parameters += [f"const int {length}" for length in lengths]
        shapes.append(f"  const int {name}_shape[] = {{{', '.join(lengths)}}};\n")
    name = unique_name(f"qchat_{kernel.name}", header, body, *parameters)
    head = f'extern "C" __global__ void {name}({", ".join(parameters)})'
    return f"{header}\n{head} {{\n{''.join(shapes)}{body}\n}}\n", name


# what records a launch: of a kernel with inputs, blocks, and the shapes and dtypes of its outputs
Recorder = Callable[
    [Kernel, Sequence[mx.array], tuple[int, int, int], Sequence[tuple[tuple[int, ...], mx.Dtype]]],
    list[mx.array],
]
_recorder: Recorder | None = None


@contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """Let `recorder` take the place of MLX for every kernel that is called meanwhile."""
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


def is_recorded() -> bool:
    """Whether kernels are recorded in place of being run, so that nothing but kernels may compute."""
    return _recorder is not None


def cuda_code(
    kernel: Kernel, inputs: Sequence[mx.array], outputs: Sequence[mx.Dtype]
) -> tuple[str, bytes] | None:
    """Return the name and machine code of a kernel for these arrays; None where MLX has to compile it."""
    return _machine_code(kernel, tuple((array.dtype, array.ndim) for array in inputs), tuple(outputs))


@cache
def _machine_code(
    kernel: Kernel, inputs: tuple[tuple[mx.Dtype, int], ...], outputs: tuple[mx.Dtype, ...]
) -> tuple[str, bytes] | None:
    """Return name and machine code of a kernel for these dtypes and axes; None to leave it to MLX."""
    source, name = cuda_program(kernel, inputs, outputs)
    code = machine_code(source, name, str(mx.device_info().get("architecture")))
    return None if code is None else (name, code)


@cache
def _build(kernel: Kernel, backend: Backend) -> Callable[..., list[mx.array]]:
    """Return MLX's custom kernel, which is compiled at its first launch."""
    header, source = texts(kernel, backend)
    make = mx.fast.cuda_kernel if backend == "cuda" else mx.fast.metal_kernel
    return make(  # pyright: ignore[reportReturnType]
        name=unique_name(f"qchat_{kernel.name}", header, source),  # MLX caches by name
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=header,
        source=source,
    )


_distrusted: set[Backend] = set()
_trusted: set[Backend] = set()


def distrust() -> None:
    """Make `backend` return None for this device from now on, because our kernels failed on it."""
    device = _device()
    if device:
        _distrusted.add(device)


def trust() -> None:
    """Make `backend` return this device from now on, because all our kernels passed their trial on it."""
    device = _device()
    if device:
        _trusted.add(device)
        _distrusted.discard(device)


def tuned() -> bool:
    """Whether forms of operations are chosen by racing them. Raises UsageError for a bad QCHAT_TUNE."""
    return _read("QCHAT_TUNE", ("auto", "off")) == "auto"


def forced_on() -> bool:
    """Whether QCHAT_KERNELS asks for our kernels wherever they fit."""
    return _read("QCHAT_KERNELS", ("auto", "on", "off")) == "on"


def may_try() -> Backend | None:
    """Return the backend on which our kernels may be tried here: a GPU's, unless QCHAT_KERNELS is `off`."""
    return None if _read("QCHAT_KERNELS", ("auto", "on", "off")) == "off" else _device()


def backend() -> Backend | None:
    """Return the backend of our kernels on the default device; None where they are not used.

    On Metal they are used after a trial on the device, or with QCHAT_KERNELS=on; with QCHAT_TUNE=off nowhere,
    unless they are on. Raises UsageError for unknown values of the two.
    """
    choice, device = _read("QCHAT_KERNELS", ("auto", "on", "off")), _device()
    proven = device == "cuda" or device in _trusted
    wanted = choice == "on" or (choice == "auto" and tuned() and proven)
    return device if wanted and device not in _distrusted else None


def _read(variable: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(variable, values[0])
    if value not in values:
        raise UsageError(f"{variable} is {value!r}, wanted {', '.join(values)}")
    return value


@cache
def _device() -> Backend | None:
    if not on_gpu():
        return None
    return "metal" if mx.metal.is_available() else "cuda"
