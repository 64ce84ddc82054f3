"""What the machine could do at best: bytes moved per second, bytes a decoded token needs, bytes there are.

A token cannot be decoded faster than its weights are read: `step_nbytes` over the bandwidth is a lower bound.
"""

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX
from ..checkpoint.packed import Packed
from .backend import Policy, mx, on_gpu

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
    """By all cores: MLX's own operations use one on a CPU, and the BLAS that decodes uses all."""
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


def step_nbytes(tensors: Mapping[str, mx.array | Packed], config: ModelConfig, policy: Policy | None) -> int:
    """Bytes of weights that are read to decode one token, as `policy` keeps them or, with none, as they are
    stored; of experts only the chosen.

    `tensors` by canonical name. The context's keys, values and states come on top.
    """
    table = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    total = 0.0
    for name, tensor in tensors.items():
        if name.startswith(MTP_PREFIX) or (name in ("embed_tokens", "lm_head") and name != table):
            continue
        share = config.num_experts_per_tok / config.num_experts if ".switch_mlp." in name else 1.0
        total += share * _kept_nbytes(tensor, policy)
    return round(total)


def _kept_nbytes(tensor: mx.array | Packed, policy: Policy | None) -> int:
    if policy is None:
        return tensor.nbytes
    width = policy.activations.size
    if isinstance(tensor, Packed):
        if policy.dense:
            return tensor.scales.size * tensor.group_size * width
        scales = tensor.scales.nbytes if tensor.biases is None else 2 * tensor.scales.size * width
        return tensor.weight.nbytes + scales
    return tensor.size * (width if policy.dense else min(width, tensor.dtype.size))


def device_memory_nbytes() -> int:
    """Bytes that the compute device can hold: on Apple silicon what it recommends at most; 0 if unknown."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
