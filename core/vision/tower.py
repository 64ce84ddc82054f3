"""The vision tower of Qwen3.5, as Hugging Face writes it: patches of one picture to the rows of its tokens.

Learned positions are interpolated to the picture's grid; attention is full. Axes: N patches, H heads of D
columns. A merger joins the patches of a token; a tower with deepstack has more of them, after inner blocks.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.config import ModelConfig
from ..checkpoint.reader import LazyReader
from ..checkpoint.stored import open_checkpoint
from ..checkpoint.vision import PATCHES, VisionConfig, find_vision, vision_specs
from ..errors import ConfigError, WeightsError
from ..machine.backend import mx, on_gpu
from ..ops.elementwise import masked_softmax
from .pixels import Grid

EPS = 1e-6
ROPE_THETA = 10_000.0
SCORES_NBYTES = 256 << 20  # of the attention of one block of queries


class Rows(NamedTuple):
    """What stands for a picture: `embeddings` [tokens, out] in place of those of its ids.

    `deepstack` has one array of the same shape for each of the first layers, which add it to their output.
    """

    embeddings: mx.array
    deepstack: tuple[mx.array, ...]


class Tower:
    """The network; weights as stored, activations in `dtype`."""

    def __init__(self, config: VisionConfig, tensors: Mapping[str, mx.array], dtype: mx.Dtype):
        self.config, self._tensors, self.dtype = config, tensors, dtype

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, dtype: mx.Dtype) -> "Tower":
        """Find and check the tensors in a model folder; MLX reads them when they are first used.

        Raises ConfigError, WeightsError naming the tensor.
        """
        tower = VisionConfig.of(config)
        if tower is None:
            raise ConfigError(f"{config.source} describes no vision tower")
        tower.check_supported()
        if tower.out_hidden_size != config.hidden_size:
            raise ConfigError(
                f"{tower.where}: out_hidden_size is {tower.out_hidden_size}, wanted the model's hidden_size, "
                f"{config.hidden_size}"
            )
        found, reader = find_vision(open_checkpoint(folder).vision, config), LazyReader()
        tensors: dict[str, mx.array] = {}
        for name, shape in vision_specs(tower).items():
            if name not in found:
                raise WeightsError(f"{folder}: the vision tower lacks {name}")
            tensor = found[name]
            if tensor.shape != shape:
                raise tensor.stored.refuse(f"has the shape {list(tensor.shape)}, wanted {list(shape)}")
            values = reader.read(tensor.stored)
            if name == PATCHES:
                order = (0, 1, 2, 3, 4) if tensor.is_channels_first else (0, 4, 1, 2, 3)
                values = values.transpose(order).reshape(shape[0], -1)  # [hidden, C * T * P * P]
            tensors[name] = values
        return cls(tower, tensors, dtype)

    def __call__(self, patches: mx.array, grid: Grid) -> Rows:
        """Map the patches [N, C * T * P * P] of one picture to its rows. Raises WeightsError for NaN."""
        config, (rows, columns) = self.config, patch_places(grid, self.config.spatial_merge_size)
        x = self._product("patch_embed.proj", patches.astype(self.dtype))  # [N, hidden]
        x = x + self._positions(rows, columns, grid).astype(self.dtype)
        turns = _turns(rows, columns, config.hidden_size // config.num_heads)
        deepstack: list[mx.array] = []
        for block in range(config.depth):
            x = self._block(f"blocks.{block}.", x, turns)
            if block in config.deepstack_visual_indexes:
                place = config.deepstack_visual_indexes.index(block)
                deepstack.append(self._merge(f"deepstack_merger_list.{place}.", x, joined_first=True))
            mx.eval(x)
        found = Rows(self._merge("merger.", x, joined_first=False), tuple(deepstack))
        if not mx.isfinite(found.embeddings).all():
            raise WeightsError("the vision tower's outputs are not finite numbers: its weights are damaged")
        return found

    def _positions(self, rows: mx.array, columns: mx.array, grid: Grid) -> mx.array:
        """Interpolate the learned square of positions [side^2, hidden] bilinearly to each patch."""
        merge, side = self.config.spatial_merge_size, round(self.config.num_position_embeddings**0.5)
        table = self._tensors["pos_embed.weight"].astype(mx.float32)
        above, below = _neighbours(rows, grid.rows * merge, side)
        left, right = _neighbours(columns, grid.columns * merge, side)
        return sum(
            (
                table[row * side + column] * (vertical * horizontal)[:, None]
                for row, vertical in (above, below)
                for column, horizontal in (left, right)
            ),
            mx.zeros((1, 1)),
        )

    def _block(self, prefix: str, x: mx.array, turns: tuple[mx.array, mx.array]) -> mx.array:
        x = x + self._attention(f"{prefix}attn.", self._norm(f"{prefix}norm1", x), turns)
        inner = self._product(f"{prefix}mlp.linear_fc1", self._norm(f"{prefix}norm2", x))
        return x + self._product(f"{prefix}mlp.linear_fc2", _gelu_tanh(inner))

    def _attention(self, prefix: str, x: mx.array, turns: tuple[mx.array, mx.array]) -> mx.array:
        heads = self.config.num_heads
        qkv = self._product(f"{prefix}qkv", x).reshape(x.shape[0], 3, heads, -1).transpose(1, 2, 0, 3)
        q, k = (_turn(part, *turns) for part in (qkv[0], qkv[1]))  # [H, N, D]
        mixed = full_attention(q, k, qkv[2])
        return self._product(f"{prefix}proj", mixed.swapaxes(0, 1).reshape(x.shape))

    def _merge(self, prefix: str, x: mx.array, *, joined_first: bool) -> mx.array:
        """Join the patches of each token and project them to [tokens, out]."""
        joined = (-1, self.config.joined_size)
        x = self._norm(f"{prefix}norm", x.reshape(joined) if joined_first else x).reshape(joined)
        x = self._product(f"{prefix}linear_fc1", x)
        return self._product(f"{prefix}linear_fc2", x * 0.5 * (1 + mx.erf(x * math.sqrt(0.5))))

    def _product(self, name: str, x: mx.array) -> mx.array:
        weight, bias = (self._tensors[f"{name}.{part}"].astype(x.dtype) for part in ("weight", "bias"))
        return x @ weight.T + bias

    def _norm(self, name: str, x: mx.array) -> mx.array:
        weight, bias = (self._tensors[f"{name}.{part}"] for part in ("weight", "bias"))
        return mx.fast.layer_norm(x, weight, bias, EPS).astype(x.dtype)


def patch_places(grid: Grid, merge: int) -> tuple[mx.array, mx.array]:
    """Return row and column of each patch [N] int32, those of one token after the other."""
    shape = (grid.rows, grid.columns, merge, merge)
    down = mx.arange(grid.rows)[:, None, None, None] * merge + mx.arange(merge)[None, None, :, None]
    right = mx.arange(grid.columns)[None, :, None, None] * merge + mx.arange(merge)
    return mx.broadcast_to(down, shape).flatten(), mx.broadcast_to(right, shape).flatten()


def full_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attend with q to k and v, all [H, N, D], in blocks of queries whose scores fit SCORES_NBYTES."""
    heads, count, dim = q.shape
    step, scale = max(1, SCORES_NBYTES // (4 * heads * count)), dim**-0.5
    parts: list[mx.array] = []
    for begin in range(0, count, step):
        block = q[:, begin : begin + step]
        if on_gpu():
            parts.append(mx.fast.scaled_dot_product_attention(block[None], k[None], v[None], scale=scale)[0])
        else:
            scores = (block * scale) @ k.swapaxes(1, 2)
            parts.append(masked_softmax(scores, mx.zeros(1)).astype(v.dtype) @ v)
        mx.eval(parts[-1])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


Neighbour = tuple[mx.array, mx.array]


def _neighbours(index: mx.array, size: int, side: int) -> tuple[Neighbour, Neighbour]:
    """Return the two learned places around each of `size` places on an axis, with their weights."""
    place = index.astype(mx.float32) * (side - 1) / max(size - 1, 1)
    low = mx.floor(place)
    share = place - low
    first = low.astype(mx.int32)
    return (first, 1 - share), (mx.minimum(first + 1, side - 1), share)


def _turns(rows: mx.array, columns: mx.array, dim: int) -> tuple[mx.array, mx.array]:
    """Return cosines and sines [N, D / 2]: the first half turns by the row, the second by the column."""
    quarter = dim // 4
    frequencies = 1 / mx.power(ROPE_THETA, mx.arange(quarter, dtype=mx.float32) / quarter)
    angles = [place.astype(mx.float32)[:, None] * frequencies for place in (rows, columns)]
    joined = mx.concatenate(angles, axis=-1)
    return mx.cos(joined), mx.sin(joined)


def _turn(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Rotate x [H, N, D], each column of its first half with its twin in the second."""
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return mx.concatenate(turned, axis=-1).astype(x.dtype)


def _gelu_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
