"""What MLX's compute device can do: its memory bandwidth, how much memory it has, and how much is free."""

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from .backend import mx, on_gpu
from .memory import host_available_nbytes, host_total_nbytes

# far more than any cache holds
COPY_NBYTES = 128 << 20
COPIES = 5


@cache
def copy_bandwidth() -> float:
    """Bytes per second that the compute device reads and writes in a large copy, the best of a few.

    Takes a tenth of a second, once per process.
    """
    copy = _device_copy() if on_gpu() else _host_copy()
    return 2 * COPY_NBYTES / min(_seconds(copy) for _ in range(COPIES))


def _device_copy() -> Callable[[], None]:
    source = mx.zeros(COPY_NBYTES // 4, mx.float32)
    mx.eval(source)
    return lambda: mx.eval(source + 1)


def _host_copy() -> Callable[[], None]:
    """Return a copy that all cores share: MLX's own operations use one on a CPU, its products use all."""
    cores = os.cpu_count() or 1
    source, target = (ctypes.create_string_buffer(COPY_NBYTES) for _ in range(2))
    ctypes.memset(source, 1, COPY_NBYTES)
    part = COPY_NBYTES // cores

    def move(index: int) -> None:
        ctypes.memmove(ctypes.byref(target, index * part), ctypes.byref(source, index * part), part)

    def copy() -> None:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(move, range(cores)))

    return copy


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def device_limit_nbytes() -> int:
    """Bytes that the compute device can hold: on Apple silicon the most that Metal recommends to use."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if key in info:
            return int(info[key])
    return host_total_nbytes()


def device_free_nbytes() -> int:
    """Bytes that models can still take: of a GPU what this process has not taken of its limit, on a CPU what
    the system can still give; 0 if unknown."""
    if not on_gpu():
        return host_available_nbytes()
    return max(1, device_limit_nbytes() - mx.get_active_memory())  # 0 would mean unknown
