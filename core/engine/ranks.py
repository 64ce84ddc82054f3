"""One model on several machines: each rank holds a share of every large matrix, and sums make them whole.

Attention and delta net are shared by heads, MLPs and experts by their inner width (Shoeybi et al., arXiv
1909.08053). The ranks are MLX's own, started by `mlx.launch`. Refuses shapes that do not divide.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from pathlib import Path

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX
from ..checkpoint.packed import Packed
from ..checkpoint.weights import Tensor, Weights
from ..errors import GenerationError, UsageError
from ..machine.backend import mx
from .launcher import is_rank

# machines of a cluster read their programs from disks of different speed
JOIN_SECONDS = 60.0


@dataclass(frozen=True)
class Ranks:
    """`rank` of `size` processes that run one model together."""

    rank: int
    size: int

    def sum(self, x: mx.array) -> mx.array:
        """The sum of every rank's `x`."""
        return mx.distributed.all_sum(x)

    def gather(self, x: mx.array) -> mx.array:
        """The last axes of every rank's x [..., N], joined in the order of ranks."""
        parts = mx.distributed.all_gather(x[None])  # [size, ..., N]
        return mx.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)

    def agree(self, values: Sequence[int]) -> list[int]:
        """The `values` of rank 0, for all; whole numbers under 2**31."""
        own = mx.array(list(values), mx.int32) * int(self.rank == 0)
        return [int(value) for value in mx.distributed.all_sum(own).tolist()]  # pyright: ignore

    def sharers(self) -> int:
        """How many of the ranks share this one's memory: those at its address, but each has its own GPU."""
        hosts = addresses()
        return hosts.count(hosts[self.rank]) if hosts else 1

    def broadcast(self, x: mx.array) -> mx.array:
        """The `x` of rank 0, for all; of others only shape and dtype count."""
        return mx.distributed.all_sum(x if self.rank == 0 else mx.zeros_like(x))


@cache
def joined() -> Ranks | None:
    """The ranks that `mlx.launch` started, this one among them; None for a process by itself.

    Waits for those that start later. Raises GenerationError where they do not come.
    """
    if not is_rank():
        return None
    end = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            group = mx.distributed.init()
            break
        except RuntimeError as error:
            if time.monotonic() > end:
                raise GenerationError(f"the other ranks cannot be reached: {error}") from error
            time.sleep(0.2)
    return Ranks(group.rank(), group.size()) if group.size() > 1 else None


def addresses() -> list[str]:
    """The network address of each rank's machine, in the order of ranks; empty unless `mlx.launch` gives a
    file of them, as its ring backend does."""
    file = os.environ.get("MLX_HOSTFILE")
    return [places[0].rpartition(":")[0] for places in json.loads(Path(file).read_text())] if file else []


def share(config: ModelConfig, weights: Weights, ranks: Ranks) -> tuple[ModelConfig, Weights]:
    """What this rank holds: its config, with fewer heads and narrower blocks, and its part of the weights.

    The draft head is left out: what it saves, its sums over ranks would cost. Nothing is evaluated.
    Raises UsageError where heads, widths or quantization groups do not divide.
    """
    cut = _Cut(config, ranks)
    kept = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(MTP_PREFIX)}
    tensors = {name: cut.tensor(name, tensor) for name, tensor in kept.items()}
    return cut.config, replace(weights, tensors=tensors, has_mtp=False)


class _Cut:
    """Which rows and columns of each tensor are this rank's."""

    def __init__(self, config: ModelConfig, ranks: Ranks):
        self.whole, self.ranks = config, ranks
        self.config = replace(
            config,
            num_attention_heads=self._each("num_attention_heads"),
            num_key_value_heads=self._each("num_key_value_heads", shared=True),
            linear_num_value_heads=self._each("linear_num_value_heads"),
            linear_num_key_heads=self._each("linear_num_key_heads", shared=True),
            intermediate_size=self._each("intermediate_size"),
            moe_intermediate_size=self._each("moe_intermediate_size"),
            shared_expert_intermediate_size=self._each("shared_expert_intermediate_size"),
        )
        queries, keys = self._rows("num_attention_heads"), self._rows("num_key_value_heads")
        delta_keys, values = self._rows("linear_num_key_heads"), self._rows("linear_num_value_heads")
        mixed = [(delta_keys, "linear_num_key_heads", config.linear_key_head_dim)] * 2
        mixed += [(values, "linear_num_value_heads", config.linear_value_head_dim)]
        self.head_rows: dict[str, list[slice]] = {
            "q_proj": [_times(queries, 2 * config.head_dim)],
            **{name: [_times(keys, config.head_dim)] for name in ("k_proj", "v_proj")},
            **{name: self._stacked(mixed) for name in ("in_proj_qkv", "conv1d")},
            "in_proj_z": [_times(values, config.linear_value_head_dim)],
            **{name: [values] for name in ("in_proj_a", "in_proj_b", "A_log", "dt_bias")},
        }
        self.head_columns = {
            "o_proj": _times(queries, config.head_dim),
            "out_proj": _times(values, config.linear_value_head_dim),
        }

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of the tensor with this canonical name; all of it where it is not shared."""
        last = name.rpartition(".")[2]
        if last in self.head_rows:
            return _rows_of(tensor, self.head_rows[last], axis=0)
        if last in self.head_columns:
            return self._columns_of(name, tensor, self.head_columns[last])
        if last in ("gate_proj", "up_proj"):
            return _rows_of(tensor, [self._part(_shape(tensor)[-2])], axis=-2)
        if last == "down_proj":
            return self._columns_of(name, tensor, self._part(_shape(tensor)[-1]))
        if name == "lm_head" and self.shares_head:
            return _rows_of(tensor, [self._part(self.whole.vocab_size)], axis=0)
        return tensor

    @property
    def shares_head(self) -> bool:
        return shares_head(self.whole, self.ranks)

    def _each(self, field: str, *, shared: bool = False) -> int:
        """Of so many each rank has an equal number; of `shared` ones several ranks may have the same."""
        number, size = getattr(self.whole, field), self.ranks.size
        if number % size == 0:
            return number // size
        if shared and size % number == 0:
            return 1
        raise UsageError(f"{size} ranks cannot share this model evenly: its {field} is {number}")

    def _rows(self, field: str) -> slice:
        """This rank's among the heads of one kind."""
        number, size, rank = getattr(self.whole, field), self.ranks.size, self.ranks.rank
        return (
            self._part(number)
            if number % size == 0
            else slice(rank * number // size, rank * number // size + 1)
        )

    def _part(self, number: int) -> slice:
        each = number // self.ranks.size
        return slice(self.ranks.rank * each, (self.ranks.rank + 1) * each)

    def _stacked(self, blocks: Sequence[tuple[slice, str, int]]) -> list[slice]:
        """This rank's rows of blocks that lie below each other, each of so many heads of so many rows."""
        rows, start = [], 0
        for heads, field, width in blocks:
            own = _times(heads, width)
            rows.append(slice(start + own.start, start + own.stop))
            start += getattr(self.whole, field) * width
        return rows

    def _columns_of(self, name: str, tensor: Tensor, columns: slice) -> Tensor:
        if isinstance(tensor, mx.array):
            return tensor[..., columns]
        group, word = tensor.group_size, 32 // gcd(32, tensor.bits)
        if columns.start % group or columns.stop % group or columns.start % word:
            raise UsageError(
                f"{self.ranks.size} ranks cannot share {name}: its groups of {group} weights would be cut"
            )
        words = slice(columns.start * tensor.bits // 32, columns.stop * tensor.bits // 32)
        scales = slice(columns.start // group, columns.stop // group)
        return _sliced(tensor, lambda array, weight: array[..., words if weight else scales])


def shares_head(config: ModelConfig, ranks: Ranks | None) -> bool:
    """Whether the output head is shared by rows of the vocabulary; a tied one is the embedding as well."""
    return ranks is not None and not config.tie_word_embeddings and config.vocab_size % ranks.size == 0


def _times(rows: slice, width: int) -> slice:
    return slice(rows.start * width, rows.stop * width)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    if isinstance(tensor, Packed):
        return (*tensor.scales.shape[:-1], tensor.scales.shape[-1] * tensor.group_size)
    return tensor.shape


def _rows_of(tensor: Tensor, rows: Sequence[slice], *, axis: int) -> Tensor:
    """The given rows along `axis`, which is 0 or -2."""

    def take(array: mx.array, _weight: bool = False) -> mx.array:
        parts = [array[r] if axis == 0 else array[..., r, :] for r in rows]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)

    return _sliced(tensor, take) if isinstance(tensor, Packed) else take(tensor)


def _sliced(packed: Packed, cut: Callable[[mx.array, bool], mx.array]) -> Packed:
    biases = None if packed.biases is None else cut(packed.biases, False)
    return replace(packed, weight=cut(packed.weight, True), scales=cut(packed.scales, False), biases=biases)
