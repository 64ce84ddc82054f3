"""What a model remembers of a sequence: `KVCache` (can be cut back) and `DeltaState` (cannot), one per layer.

Arrays are never written in place after they were handed out, so a state that somebody kept stays what it was.
"""

from dataclasses import dataclass, field

from .backend import mx
from .config import ModelConfig

# capacity grows by this many tokens at a time, so that one append in 256 copies
GROWTH = 256


class KVCache:
    """Keys and values [B, H, T, D] of one attention layer."""

    def __init__(self):
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values [B, H, T, D]; returns all so far [B, H, length, D]."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys = _grown(self.keys, keys, start, self.length)
        self.values = _grown(self.values, values, start, self.length)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def trim(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.length = min(self.length, length)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.keys, self.values) if a is not None]


def _grown(buffer: mx.array | None, new: mx.array, used: int, needed: int) -> mx.array:
    if buffer is not None and needed <= buffer.shape[2]:
        return buffer
    batch, heads, _, dim = new.shape
    capacity = -(-needed // GROWTH) * GROWTH
    if buffer is None:
        return mx.zeros((batch, heads, capacity, dim), new.dtype)
    more = mx.zeros((batch, heads, capacity - used, dim), new.dtype)
    return mx.concatenate([buffer[:, :, :used], more], axis=2)


@dataclass
class DeltaState:
    """The last K-1 convolution inputs [B, K-1, channels] and the recurrent state [B, Hv, Dk, Dv]
    (float32)."""

    conv: mx.array
    state: mx.array

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.state.nbytes

    def arrays(self) -> list[mx.array]:
        return [self.conv, self.state]


@dataclass
class Cache:
    """All layers' memories of one sequence; `length` tokens have been read."""

    layers: list[KVCache | DeltaState]
    length: int = field(default=0)

    @classmethod
    def empty(cls, config: ModelConfig, dtype: mx.Dtype) -> "Cache":
        """A cache for one sequence that has read nothing."""
        return cls(
            [
                KVCache() if kind == "full_attention" else _empty_state(config, dtype)
                for kind in config.layer_types
            ]
        )

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def arrays(self) -> list[mx.array]:
        return [a for layer in self.layers for a in layer.arrays()]


def _empty_state(config: ModelConfig, dtype: mx.Dtype) -> DeltaState:
    conv = mx.zeros((1, config.linear_conv_kernel_dim - 1, config.conv_dim), dtype)
    heads, key, value = (
        config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim,
    )  # fmt: skip
    return DeltaState(conv, mx.zeros((1, heads, key, value), mx.float32))
