"""Recorded launches: while a `Recording` is active, kernels are written down in place of being run by MLX.

Their outputs are arrays that stay where they are, so the same launches can be repeated: the driver makes a
graph of them (`cuda_driver`). Everything between the first and the last launch must be a `Kernel`.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from ..machine.backend import mx
from .cuda_driver import Driver, DriverError, Graph
from .launch import Kernel, cuda_code, recorded_by

ADDRESSES_AT_ONCE = 256
LANES, COPY_THREADS = 32, 256
Result = tuple[tuple[int, ...], mx.Dtype]


class Launch(NamedTuple):
    """A kernel that was called, with its inputs and then its outputs."""

    kernel: Kernel
    inputs: list[mx.array]
    outputs: list[mx.array]
    blocks: tuple[int, int, int]


class Buffers:
    """Arrays for the outputs of recorded kernels, the same ones in every recording that asks alike."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, Result], mx.array] = {}

    def get(self, number: int, result: Result) -> mx.array:
        """Return the array of the output `number` of a recording."""
        place = (number, result)
        if place not in self._arrays:
            self._arrays[place] = mx.zeros(*result)
        return self._arrays[place]


class Recording:
    """The launches of kernels that were called while it was active."""

    def __init__(self, buffers: Buffers):
        self.launches: list[Launch] = []
        self._buffers, self._count = buffers, 0
        self._targets: dict[str, mx.array] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Write down the kernels that are called meanwhile."""
        with recorded_by(self.launch):
            yield

    @contextmanager
    def into(self, **targets: mx.array) -> Iterator[None]:
        """Let kernels write the outputs of these names into these arrays."""
        self._targets = targets
        try:
            yield
        finally:
            self._targets = {}

    def launch(
        self,
        kernel: Kernel,
        arrays: Sequence[mx.array],
        blocks: tuple[int, int, int],
        results: Sequence[Result],
    ) -> list[mx.array]:
        """Write a launch down; return the arrays that it will fill."""
        outputs = []
        for name, result in zip(kernel.outputs, results, strict=True):
            target = self._targets.get(name)
            outputs.append(self._buffers.get(self._count, result) if target is None else target)
            self._count += 1
        self.launches.append(Launch(kernel, list(arrays), outputs, blocks))
        return outputs

    def arrays(self) -> list[mx.array]:
        """Return all arrays that the launches read or write, each once."""
        every = (array for launch in self.launches for array in (*launch.inputs, *launch.outputs))
        return list({id(array): array for array in every}.values())


def graph_of(recording: Recording, driver: Driver) -> Graph:
    """Return the launches as a graph of the driver; whoever keeps it must keep the arrays.

    Raises DriverError where a kernel has no machine code.
    """
    arrays = recording.arrays()
    where = dict(zip(map(id, arrays), addresses(arrays), strict=True))
    functions = [_load(launch, driver) for launch in recording.launches]
    with driver.captured() as graph:
        for function, (kernel, inputs, outputs, blocks) in zip(functions, recording.launches, strict=True):
            places = [where[id(array)] for array in (*inputs, *outputs)]
            driver.launch(function, blocks, kernel.threads, places, kernel.lengths(inputs))
    return graph


def _load(launch: Launch, driver: Driver) -> ctypes.c_void_p:
    code = cuda_code(launch.kernel, launch.inputs, [array.dtype for array in launch.outputs])
    if code is None:
        raise DriverError(f"{launch.kernel.name} has no machine code")
    return driver.function(*code)


def addresses(arrays: Sequence[mx.array]) -> list[int]:
    """Return where the elements of each array are in the device's memory now.

    They change when the host reads an array, as MLX moves its memory then. Computes the arrays.
    """
    found = []
    for first in range(0, len(arrays), ADDRESSES_AT_ONCE):
        found += read_with_addresses(arrays[0], arrays[first : first + ADDRESSES_AT_ONCE])[1]
    return found


def read_with_addresses(
    number: mx.array, arrays: Sequence[mx.array], also: Sequence[mx.array] = ()
) -> tuple[int, list[int]]:
    """Return the number [1], and the addresses of at most ADDRESSES_AT_ONCE arrays, in one go.

    Computes `also` as well.
    """
    count = max(1 << (len(arrays) - 1).bit_length(), LANES)  # so that few kernels serve
    filled = [*arrays, *[arrays[-1]] * (count - len(arrays))]
    kernel = address_kernel(count)
    (words,) = kernel([number, *filled], blocks=(1, 1, 1), results=[((1 + 2 * count,), mx.uint32)])
    mx.eval(words, *also)
    first, *rest = map(int, words.tolist())  # pyright: ignore[reportArgumentType]
    places = [low | high << 32 for low, high in zip(rest[::2], rest[1::2], strict=True)]
    return first, places[: len(arrays)]


def signal(done: mx.array, ticket: mx.array, recording: Recording) -> None:
    """Record, as the last launch, that `done` [1] becomes what `ticket` [1] then is."""
    with recording.into(done=done):
        signal_kernel()([ticket], blocks=(1, 1, 1), results=[(done.shape, mx.uint32)])


def copy_after(done: mx.array, ticket: int, arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return copies of `arrays`, whose bytes are multiples of four, made by MLX once `done` is `ticket`.

    What MLX computes after these does not begin before that either.
    """
    blocks = (1, 1, 1)
    (go,) = await_kernel()([done, mx.array([ticket], mx.uint32)], blocks=blocks, results=[((1,), mx.uint32)])
    copies = []
    for array in arrays:
        words = array.nbytes // 4
        (copy,) = copy_kernel(array.dtype)(
            [array, go], blocks=(-(-words // COPY_THREADS), 1, 1), results=[((words,), mx.uint32)]
        )
        copies.append(copy.view(array.dtype).reshape(array.shape))
    mx.async_eval(copies)
    return copies


@cache
def signal_kernel() -> Kernel:
    body = "  __threadfence();\n  if (tid == 0) *(volatile uint*)done = ticket[0];\n"
    return Kernel("signal", ("ticket",), ("done",), body, LANES)


@cache
def await_kernel() -> Kernel:
    """Return the kernel that waits until another stream's has written `ticket` or more to `done`."""
    body = """
  if (tid == 0) {
    while (int(*(const volatile uint*)done - ticket[0]) < 0) __nanosleep(200);
    __threadfence();
    go[0] = 1;
  }
"""
    return Kernel("await", ("done", "ticket"), ("go",), body, LANES)


@cache
def copy_kernel(dtype: mx.Dtype) -> Kernel:
    """Return the kernel that copies words of `from`, an array of `dtype`, once `go` is there."""
    body = f"""
  const uint place = block_x * {COPY_THREADS} + tid;
  const uint words = uint(from_shape[0]) * uint(from_shape[1]) / {4 // dtype.size};
  if (place < words) to[place] = ((const volatile uint*)from)[place];
"""
    return Kernel("copy", ("from", "go"), ("to",), body, COPY_THREADS)


@cache
def address_kernel(count: int) -> Kernel:
    """Return the kernel that writes a number, and the addresses of `count` inputs as two words each."""
    names = [f"input{number}" for number in range(count)]
    lines = [
        f"  if (tid == {number}) place = (unsigned long long){name};" for number, name in enumerate(names)
    ]
    body = "\n".join(
        [
            "  unsigned long long place = 0;",
            *lines,
            "  if (tid == 0) words[0] = uint(number[0]);",
            "  words[1 + 2 * tid] = uint(place);",
            "  words[2 + 2 * tid] = uint(place >> 32);",
        ]
    )
    return Kernel("addresses", ("number", *names), ("words",), body, count)
