"""The one place that imports MLX, and the one that chooses how the machine at hand is used.

Environment: QCHAT_ACTIVATIONS (`auto`, `float32`, `bfloat16`, `float16`), QCHAT_DENSE (`auto`, `on`, `off`:
keep weights dense), QCHAT_COMPILE (`auto`, `on`, `off`); see `linux_cpu` for what comes before MLX.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from ..errors import UsageError
from .fusion import Fused, choice
from .linux_cpu import keep_pages, open_blas
from .subnormals import flush_on_request


def cache_path(name: str) -> Path | None:
    """Where compiled things of this name are kept; None for a user without a home."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # the specification has relative paths ignored
        return (base if base.is_absolute() else Path.home() / ".cache") / "qchat" / name
    except RuntimeError:
        return None


def _keep_compiled() -> None:
    """Let MLX's CUDA backend keep what it compiles where it outlives a restart, not among temporary files."""
    path = cache_path(f"ptx-{version('mlx')}")
    if path is not None:
        os.environ.setdefault("MLX_PTX_CACHE_DIR", str(path))


flush_on_request()
_blas_notice = open_blas()
keep_pages()
_keep_compiled()

import mlx.core as mx  # noqa: E402  the BLAS must be open first

__all__ = ["Policy", "cache_path", "choose_policy", "free_memory_nbytes", "fuse", "mx", "on_gpu"]

F = TypeVar("F", bound=Callable)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# of the free memory, what dense float32 weights may take
DENSE_SHARE = 0.5


@dataclass(frozen=True)
class Policy:
    """How one model runs: the dtype of its activations; dense weights (float32 on a CPU) or packed ones.

    `sum` adds up what several processes computed, each with its part of a matrix; None for one by itself.
    """

    activations: mx.Dtype
    dense: bool
    notices: tuple[str, ...] = ()
    sum: Callable[[mx.array], mx.array] | None = None


def on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def free_memory_nbytes() -> int:
    """Bytes this Linux machine could still give, by the kernel's own count; 0 where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def choose_policy(parameters: int) -> Policy:
    """The policy for a model of `parameters` weights on this machine.

    On a GPU weights stay as stored and activations are bfloat16. On a CPU activations are float32 (bfloat16
    products are ten times slower there) and weights are dense float32 where they fit. Raises UsageError for
    a bad variable.
    """
    gpu = on_gpu()
    activations = _choice("QCHAT_ACTIVATIONS", tuple(DTYPES))
    dense = _choice("QCHAT_DENSE", ("on", "off"))
    notices = [_blas_notice] if _blas_notice and not gpu else []
    if dense == "auto" and not gpu and not _dense_fits(parameters):
        notices.append(
            "the weights do not fit in memory as float32: they stay packed, which is slower on a CPU"
        )
    return Policy(
        activations=DTYPES.get(activations, mx.bfloat16 if gpu else mx.float32),
        dense=dense == "on" or (dense == "auto" and not gpu and _dense_fits(parameters)),
        notices=tuple(notices),
    )


def fuse(function: F) -> F:
    """`function` with its elementwise chains fused by MLX's compiler; on a CPU once its kernels are loaded.

    Raises UsageError for a bad QCHAT_COMPILE.
    """
    if choice() == "off":
        return function
    return mx.compile(function) if on_gpu() else Fused(function, mx.compile)  # pyright: ignore[reportReturnType]


def _choice(variable: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", *values):
        raise UsageError(f"{variable} is {value!r}, wanted auto, {', '.join(values)}")
    return value


def _dense_fits(parameters: int) -> bool:
    free = free_memory_nbytes()
    return free == 0 or 4 * parameters <= DENSE_SHARE * free
