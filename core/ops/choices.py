"""The form that each operation takes: forced by the environment, the winner of a race, or the usual one.

Winners are kept by operation and shape, so that several models in one process do not disturb each other.
`race` finds them; a layer asks once, when it is built.
"""

from collections.abc import Mapping
from typing import Literal

from ..checkpoint.packed import Packed
from ..kernels.launch import backend, forced_on, tuned
from ..machine.backend import mx

Key = tuple[str, str]  # an operation and a shape
# the lengths that are raced apart: one token, a few, a prompt
LENGTHS: Mapping[str, int] = {"1 token": 1, "2 to 8 tokens": 4, "a prompt": 256}
FEW = 8
OURS = "ours"

_winners: dict[Key, str] = {}


def adopt(winners: Mapping[Key, str]) -> None:
    """Use these winners from now on, for layers that are built later."""
    _winners.update(winners)


def forget() -> None:
    """Drop all winners."""
    _winners.clear()


def winner(operation: str, shape: str) -> str | None:
    """Return the winner of a race; None if none was held, or with QCHAT_TUNE=off.

    None counts for a single token on CUDA: only our kernels can be part of the graph that a step is there,
    which saves more.
    """
    if not tuned() or (backend() == "cuda" and operation.endswith(("1 token", "1 row"))):
        return None
    return _winners.get((operation, shape))


def takes_ours(operation: str, shape: str) -> bool:
    """Whether our kernels are the form in use, where they fit: forced, or not beaten."""
    if backend() is None or forced_on():
        return backend() is not None
    return winner(operation, shape) in (None, OURS)


def delta_operation(length: str) -> str:
    """Return the name of the delta net's operation for one of LENGTHS."""
    return f"delta net, {length}"


def delta_shape(key_heads: int, key_dim: int, value_heads: int, value_dim: int) -> str:
    return f"{key_heads} x {key_dim} keys, {value_heads} x {value_dim} values"


def product_operation(rows: int) -> str:
    return "product, 1 row" if rows == 1 else "product, 2 to 8 rows"


def weight_format(weight: mx.array | Packed) -> str:
    """Return a name for how a weight is stored."""
    if isinstance(weight, mx.array):
        return str(weight.dtype).removeprefix("mlx.core.")
    return f"{weight.mode} {weight.bits} bits, groups of {weight.group_size}"


def attention_shape(heads: int, kv_heads: int, dim: int) -> str:
    return f"{heads} x {dim} queries, {kv_heads} keys"


def experts_shape(experts: int, top: int, weight: mx.array | Packed) -> str:
    return f"{top} of {experts}, {weight_format(weight)}"


Length = Literal["1 token", "2 to 8 tokens", "a prompt"]


def length_of(tokens: int) -> Length:
    """Return the one of LENGTHS that so many tokens belong to."""
    return "1 token" if tokens == 1 else "2 to 8 tokens" if tokens <= FEW else "a prompt"
