"""The only module that imports MLX; decides how a model runs on this machine.

Environment: QCHAT_ACTIVATIONS (`auto`, `float32`, `bfloat16`, `float16`), QCHAT_DENSE (`auto`, `on`, `off`:
keep weights dense), QCHAT_COMPILE (`auto`, `on`, `off`). `linux_cpu` reads its own before MLX is imported.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

from ..errors import UsageError
from .files import cache_path
from .fusion import Fused, choice
from .linux_cpu import keep_freed_pages, open_blas
from .memory import host_available_nbytes
from .subnormals import flush_on_request


def _keep_compiled_kernels() -> None:
    """Have MLX's CUDA backend cache its kernels where they survive a restart, not in a temporary folder."""
    path = cache_path(f"ptx-{version('mlx')}")
    if path is not None:
        os.environ.setdefault("MLX_PTX_CACHE_DIR", str(path))


flush_on_request()
_blas_notice = open_blas()
keep_freed_pages()
_keep_compiled_kernels()

import mlx.core as mx  # noqa: E402  the BLAS must be opened first

__all__ = ["Policy", "choose_policy", "fuse", "mx", "on_gpu"]

F = TypeVar("F", bound=Callable)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# largest share of the free memory for dense float32 weights
DENSE_SHARE = 0.5


@dataclass(frozen=True)
class Policy:
    """The way a model runs: the dtype of its activations, and whether weights are dense or stay packed.

    `sum` adds the partial products of several ranks; None for a model that runs in one process.
    """

    activations: mx.Dtype
    dense: bool
    notices: tuple[str, ...] = ()
    sum: Callable[[mx.array], mx.array] | None = None


def on_gpu() -> bool:
    """Whether MLX's default device is a GPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def choose_policy(parameters: int) -> Policy:
    """Choose the policy for a model of `parameters` weights on this machine.

    On a GPU weights stay as stored and activations are bfloat16. On a CPU activations are float32 (bfloat16
    products are ten times slower there) and weights are dense float32 where they fit. Raises UsageError for
    an invalid environment variable.
    """
    gpu = on_gpu()
    activations = _read_choice("QCHAT_ACTIVATIONS", tuple(DTYPES))
    dense = _read_choice("QCHAT_DENSE", ("on", "off"))
    notices = [_blas_notice] if _blas_notice and not gpu else []
    if dense == "auto" and not gpu and not _dense_fits(parameters):
        notices.append(
            "the weights do not fit in memory as float32, so they stay packed, which is slower on a CPU"
        )
    return Policy(
        activations=DTYPES.get(activations, mx.bfloat16 if gpu else mx.float32),
        dense=dense == "on" or (dense == "auto" and not gpu and _dense_fits(parameters)),
        notices=tuple(notices),
    )


def fuse(function: F) -> F:
    """Fuse the elementwise operations of `function` by MLX's compiler; on a CPU once its kernels exist.

    Raises UsageError for a bad QCHAT_COMPILE.
    """
    if choice() == "off":
        return function
    return mx.compile(function) if on_gpu() else Fused(function, mx.compile)  # pyright: ignore[reportReturnType]


def _read_choice(variable: str, values: tuple[str, ...]) -> str:
    """Read an environment variable, `auto` by default. Raises UsageError for another value."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", *values):
        raise UsageError(f"{variable} is {value!r}, wanted auto, {', '.join(values)}")
    return value


def _dense_fits(parameters: int) -> bool:
    free = host_available_nbytes()
    return free == 0 or 4 * parameters <= DENSE_SHARE * free
