"""Tensor parallelism: each rank holds a slice of every large matrix, and partial products are summed.

Attention and delta net are split by heads, MLPs and experts by their inner width (Shoeybi et al., arXiv
1909.08053). The ranks are MLX's own, started by `mlx.launch`. Refuses shapes that do not divide evenly.
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

# machines of a cluster start at different speeds
JOIN_SECONDS = 60.0


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `size` processes that run one model together."""

    rank: int
    size: int

    def sum(self, x: mx.array) -> mx.array:
        """Return the sum of all ranks' `x`."""
        return mx.distributed.all_sum(x)

    def gather(self, x: mx.array) -> mx.array:
        """Concatenate all ranks' x [..., N] in rank order to [..., size * N]."""
        parts = mx.distributed.all_gather(x[None])  # [size, ..., N]
        return mx.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)

    def broadcast_ints(self, values: Sequence[int]) -> list[int]:
        """Return rank 0's `values`, whole numbers below 2**31; on other ranks only their number counts."""
        own = mx.array(list(values), mx.int32) * int(self.rank == 0)
        return [int(value) for value in mx.distributed.all_sum(own).tolist()]  # pyright: ignore

    def sharers(self) -> int:
        """Return how many ranks share this one's memory: those at its address, but each has its own GPU."""
        hosts = addresses()
        return hosts.count(hosts[self.rank]) if hosts else 1

    def broadcast(self, x: mx.array) -> mx.array:
        """Return rank 0's `x`; on other ranks only its shape and dtype count."""
        return mx.distributed.all_sum(x if self.rank == 0 else mx.zeros_like(x))


@cache
def join_ranks() -> Ranks | None:
    """Join the ranks that `mlx.launch` started; returns None for a process that runs alone.

    Waits for ranks that start later. Raises GenerationError where they do not.
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
                raise GenerationError(f"cannot reach the other ranks: {error}") from error
            time.sleep(0.2)
    return Ranks(group.rank(), group.size()) if group.size() > 1 else None


def addresses() -> list[str]:
    """Return the network address of each rank's machine, in the order of ranks.

    Empty unless `mlx.launch` passes a file of them, as its ring backend does.
    """
    file = os.environ.get("MLX_HOSTFILE")
    return [places[0].rpartition(":")[0] for places in json.loads(Path(file).read_text())] if file else []


def slice_for_rank(config: ModelConfig, weights: Weights, ranks: Ranks) -> tuple[ModelConfig, Weights]:
    """Return this rank's config, with fewer heads and narrower blocks, and its slices of the weights.

    Leaves out the MTP head: speculative decoding is off in multi-rank runs, where the sums over ranks cost as
    much as it saves. Evaluates nothing. Raises UsageError where heads, widths or quantization groups do not
    divide evenly.
    """
    slicer = _Slicer(config, ranks)
    kept = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(MTP_PREFIX)}
    tensors = {name: slicer.slice_tensor(name, tensor) for name, tensor in kept.items()}
    return slicer.config, replace(weights, tensors=tensors, has_mtp=False)


class _Slicer:
    """Knows which rows and columns of each tensor belong to this rank."""

    def __init__(self, config: ModelConfig, ranks: Ranks):
        self.whole, self.ranks = config, ranks
        self.config = replace(
            config,
            num_attention_heads=self._count_per_rank("num_attention_heads"),
            num_key_value_heads=self._count_per_rank("num_key_value_heads", shared=True),
            linear_num_value_heads=self._count_per_rank("linear_num_value_heads"),
            linear_num_key_heads=self._count_per_rank("linear_num_key_heads", shared=True),
            intermediate_size=self._count_per_rank("intermediate_size"),
            moe_intermediate_size=self._count_per_rank("moe_intermediate_size"),
            shared_expert_intermediate_size=self._count_per_rank("shared_expert_intermediate_size"),
        )
        queries, keys = self._head_range("num_attention_heads"), self._head_range("num_key_value_heads")
        delta_keys = self._head_range("linear_num_key_heads")
        values = self._head_range("linear_num_value_heads")
        mixed = [(delta_keys, "linear_num_key_heads", config.linear_key_head_dim)] * 2
        mixed += [(values, "linear_num_value_heads", config.linear_value_head_dim)]
        self.head_rows: dict[str, list[slice]] = {
            "q_proj": [_scale(queries, 2 * config.head_dim)],
            **{name: [_scale(keys, config.head_dim)] for name in ("k_proj", "v_proj")},
            **{name: self._stacked_rows(mixed) for name in ("in_proj_qkv", "conv1d")},
            "in_proj_z": [_scale(values, config.linear_value_head_dim)],
            **{name: [values] for name in ("in_proj_a", "in_proj_b", "A_log", "dt_bias")},
        }
        self.head_columns = {
            "o_proj": _scale(queries, config.head_dim),
            "out_proj": _scale(values, config.linear_value_head_dim),
        }

    def slice_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's slice of the tensor with this canonical name; the whole if it is not split."""
        last = name.rpartition(".")[2]
        if last in self.head_rows:
            return _slice_rows(tensor, self.head_rows[last], axis=0)
        if last in self.head_columns:
            return self._slice_columns(name, tensor, self.head_columns[last])
        if last in ("gate_proj", "up_proj"):
            return _slice_rows(tensor, [self._even_range(tensor.shape[-2])], axis=-2)
        if last == "down_proj":
            return self._slice_columns(name, tensor, self._even_range(tensor.shape[-1]))
        if name == "lm_head" and self.splits_head:
            return _slice_rows(tensor, [self._even_range(self.whole.vocab_size)], axis=0)
        return tensor

    @property
    def splits_head(self) -> bool:
        return splits_head(self.whole, self.ranks)

    def _count_per_rank(self, field: str, *, shared: bool = False) -> int:
        """Return the number per rank; several ranks may hold the same of `shared` ones.

        Raises UsageError where the number does not divide evenly.
        """
        number, size = getattr(self.whole, field), self.ranks.size
        if number % size == 0:
            return number // size
        if shared and size % number == 0:
            return 1
        raise UsageError(f"{size} ranks cannot share this model evenly: its {field} is {number}")

    def _head_range(self, field: str) -> slice:
        """Return this rank's range of the heads that `field` counts."""
        number, size, rank = getattr(self.whole, field), self.ranks.size, self.ranks.rank
        return (
            self._even_range(number)
            if number % size == 0
            else slice(rank * number // size, rank * number // size + 1)
        )

    def _even_range(self, number: int) -> slice:
        each = number // self.ranks.size
        return slice(self.ranks.rank * each, (self.ranks.rank + 1) * each)

    def _stacked_rows(self, blocks: Sequence[tuple[slice, str, int]]) -> list[slice]:
        """Return this rank's rows of stacked blocks, each (own heads, field counting heads, rows a head)."""
        rows, start = [], 0
        for heads, field, width in blocks:
            own = _scale(heads, width)
            rows.append(slice(start + own.start, start + own.stop))
            start += getattr(self.whole, field) * width
        return rows

    def _slice_columns(self, name: str, tensor: Tensor, columns: slice) -> Tensor:
        if isinstance(tensor, mx.array):
            return tensor[..., columns]
        group, word = tensor.group_size, 32 // gcd(32, tensor.bits)
        if columns.start % group or columns.stop % group or columns.start % word:
            raise UsageError(
                f"{self.ranks.size} ranks cannot share {name}: its groups of {group} weights would be split"
            )
        words = slice(columns.start * tensor.bits // 32, columns.stop * tensor.bits // 32)
        scales = slice(columns.start // group, columns.stop // group)
        return _slice_packed(tensor, lambda array, weight: array[..., words if weight else scales])


def splits_head(config: ModelConfig, ranks: Ranks | None) -> bool:
    """Whether the output head is split by vocabulary rows; a tied one is not, as it is the embedding too."""
    return ranks is not None and not config.tie_word_embeddings and config.vocab_size % ranks.size == 0


def _scale(rows: slice, width: int) -> slice:
    return slice(rows.start * width, rows.stop * width)


def _slice_rows(tensor: Tensor, rows: Sequence[slice], *, axis: int) -> Tensor:
    """Concatenate the given ranges of rows along `axis`, 0 or -2."""

    def take(array: mx.array, _weight: bool = False) -> mx.array:
        parts = [array[r] if axis == 0 else array[..., r, :] for r in rows]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)

    return _slice_packed(tensor, take) if isinstance(tensor, Packed) else take(tensor)


def _slice_packed(packed: Packed, take: Callable[[mx.array, bool], mx.array]) -> Packed:
    """Apply `take(array, is_weight)` to the codes, scales and biases of `packed`."""
    biases = None if packed.biases is None else take(packed.biases, False)
    return replace(packed, weight=take(packed.weight, True), scales=take(packed.scales, False), biases=biases)
