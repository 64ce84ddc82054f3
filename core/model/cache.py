"""What a model remembers of a sequence: `KVCache` (can be cut back) and `DeltaState` (cannot), one per layer.

A `Cache` can be copied at any moment without copying arrays: copies of a `KVCache` share one buffer, and
whoever appends anywhere but at its end gets a buffer of its own first. Recurrent states are written in place
only by whoever made them, until the next copy.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..checkpoint.config import ModelConfig
from ..checkpoint.packed import Packed
from ..errors import UsageError
from ..machine.backend import mx
from ..ops.gated_delta import state_after

# capacity grows by this many tokens at a time, so that one append in 256 copies
GROWTH = 256
# of an 8-bit cache: head dims are multiples of 64 in every published model
QUANTIZED_BITS, QUANTIZED_GROUP = 8, 64

KeysOrValues = mx.array | Packed


class KVBuffer:
    """Keys and values of `written` tokens in arrays [B, H, capacity, ...] that grow at their end only."""

    def __init__(self, parts: list[mx.array] | None = None, written: int = 0):
        self.parts = parts or []
        self.written = written

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def write(self, new: list[mx.array]) -> None:
        """Append `new`, one array [B, H, T, ...] for each part."""
        start = self.written
        self.make_room(new[0].shape[2], new)
        for part, piece in zip(self.parts, new, strict=True):
            part[:, :, start : self.written] = piece

    def make_room(self, count: int, like: list[mx.array]) -> None:
        """Count `count` more tokens as written; parts are shaped like `like`, but for their capacity."""
        start, self.written = self.written, self.written + count
        self.parts = [
            _grown(part, piece, start, self.written)
            for part, piece in zip(self.parts or [None] * len(like), like, strict=True)
        ]

    def fork(self, length: int) -> "KVBuffer":
        """A buffer of its own with the first `length` tokens."""
        return KVBuffer([mx.contiguous(part[:, :, :length]) for part in self.parts], length)

    def read(self, length: int) -> list[mx.array]:
        return [part[:, :, :length] for part in self.parts]


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
class KVCache:
    """The first `length` tokens' keys and values [B, H, T, D] of an attention layer; 8-bit if `quantized`."""

    quantized: bool = False
    buffer: KVBuffer = field(default_factory=KVBuffer)
    length: int = 0

    def append(self, keys: mx.array, values: mx.array) -> tuple[KeysOrValues, KeysOrValues]:
        """Add keys and values [B, H, T, D]; returns all so far [B, H, length, D]."""
        if not self.quantized:
            self.write([keys, values])
            k, v = self.buffer.read(self.length)
            return k, v
        packed = [mx.quantize(x, QUANTIZED_GROUP, QUANTIZED_BITS) for x in (keys, values)]
        self.write([part for parts in packed for part in parts])
        k, k_scales, k_biases, v, v_scales, v_biases = self.buffer.read(self.length)
        return _packed(k, k_scales, k_biases), _packed(v, v_scales, v_biases)

    def write(self, parts: list[mx.array]) -> None:
        """Add keys and values as the buffer holds them, each part [B, H, T, ...]."""
        self._fork_if_behind()
        self.length += parts[0].shape[2]
        self.buffer.write(parts)

    def extend(self, count: int, like: list[mx.array]) -> list[mx.array]:
        """Add `count` tokens, which the caller writes into the parts [B, H, capacity, ...] returned."""
        self._fork_if_behind()
        self.length += count
        self.buffer.make_room(count, like)
        mx.eval(self.buffer.parts)
        return self.buffer.parts

    def _fork_if_behind(self) -> None:
        if self.length != self.buffer.written:
            self.buffer = self.buffer.fork(self.length)

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens, appended since the last copy: their room is written again."""
        self.length -= count
        self.buffer.written = self.length

    def copy(self) -> "KVCache":
        return KVCache(self.quantized, self.buffer, self.length)

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def arrays(self) -> list[mx.array]:
        return self.buffer.parts


def _packed(weight: mx.array, scales: mx.array, biases: mx.array) -> Packed:
    return Packed(weight, scales, biases, QUANTIZED_GROUP, QUANTIZED_BITS, "affine")


class Tentative(NamedTuple):
    """Tokens that a delta net has read and may forget again: what its states after some of them need.

    window [B, K-1+T, channels]; keys [B, T, Hk, Dk], log decays [B, T, Hv], updates [B, T, Hv, Dv].
    """

    window: mx.array
    keys: mx.array
    decays: mx.array
    updates: mx.array


@dataclass
class DeltaState:
    """The last K-1 convolution inputs [B, K-1, channels]; the recurrent state [B, Hv, Dk, Dv] in float32.

    Both may be written in place where `private` is `state`: nobody else holds them.
    """

    conv: mx.array
    state: mx.array
    tentative: Tentative | None = None
    private: mx.array | None = None

    def keep(self, count: int) -> None:
        """Let the first `count` of the tokens read tentatively count, and forget the others."""
        if self.tentative is None:
            raise ValueError("nothing was read tentatively")
        window, *rest = self.tentative
        width = self.conv.shape[1]
        self.conv = mx.contiguous(window[:, count : count + width])
        self.state = state_after(self.state, *(part[:, :count] for part in rest))
        self.tentative = None

    def copy(self) -> "DeltaState":
        self.private = None
        return DeltaState(self.conv, self.state)

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.state.nbytes

    def arrays(self) -> list[mx.array]:
        return [self.conv, self.state]


@dataclass
class Cache:
    """All layers' memories of one sequence; `length` tokens have been read.

    `hidden` is the hidden state [1, 1, hidden] after the last of them, from which the next one is predicted.
    `ahead` is what the draft head has read: the last tokens before position `ahead_end`, or none.
    """

    layers: list[KVCache | DeltaState]
    length: int = 0
    hidden: mx.array | None = None
    ahead: KVCache = field(default_factory=KVCache)
    ahead_end: int = 0

    @classmethod
    def empty(cls, config: ModelConfig, dtype: mx.Dtype, *, quantized: bool = False) -> "Cache":
        """A cache for one sequence that has read nothing. Raises UsageError where heads cannot be packed."""
        if quantized and config.head_dim % QUANTIZED_GROUP:
            raise UsageError(
                f"keys and values cannot be kept at {QUANTIZED_BITS} bits: this model's head_dim is "
                f"{config.head_dim}, wanted a multiple of {QUANTIZED_GROUP}"
            )
        return cls(
            [
                KVCache(quantized) if kind == "full_attention" else _empty_state(config, dtype)
                for kind in config.layer_types
            ]
        )

    def copy(self) -> "Cache":
        """The same memories, to be kept: nothing that is read later changes them, and no array is copied."""
        layers = [layer.copy() for layer in self.layers]
        return Cache(layers, self.length, self.hidden, self.ahead.copy(), self.ahead_end)

    def keep(self, count: int, read: int) -> None:
        """Of `read` tokens read tentatively let the first `count` count; `hidden` is the caller's."""
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                layer.keep(count)
            else:
                layer.take_back(read - count)
        self.length -= read - count

    @property
    def quantized(self) -> bool:
        """Whether keys and values are packed."""
        return any(isinstance(layer, KVCache) and layer.quantized for layer in self.layers)

    @property
    def state_nbytes(self) -> int:
        """Bytes of what copies do not share: recurrent and convolution states."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, DeltaState))

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def arrays(self) -> list[mx.array]:
        own = [] if self.hidden is None else [self.hidden]
        return own + [a for layer in (*self.layers, self.ahead) for a in layer.arrays()]


def _empty_state(config: ModelConfig, dtype: mx.Dtype) -> DeltaState:
    conv = mx.zeros((1, config.linear_conv_kernel_dim - 1, config.conv_dim), dtype)
    heads, key_dim = config.linear_num_value_heads, config.linear_key_head_dim
    state = mx.zeros((1, heads, key_dim, config.linear_value_head_dim), mx.float32)
    return DeltaState(conv, state)
