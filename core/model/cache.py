"""The state of a sequence: for each layer a `KVCache`, which can be trimmed, or a `DeltaState`, which cannot.

Copying a `Cache` copies no array but those that are lent. Copies of a `KVCache` share one buffer, and
whichever appends anywhere but at the buffer's end first gets a buffer of its own. Caches that began alike can
be made to share their beginning (`Cache.share`). Recurrent states are written in place only by the owner of
their arrays, until the next copy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ..checkpoint.config import ModelConfig
from ..checkpoint.packed import Packed
from ..errors import UsageError
from ..machine.backend import mx
from ..ops.gated_delta import state_after

# tokens by which the capacity grows, so that one append in 256 copies the buffer
GROWTH = 256
# an 8-bit cache packs groups of 64: head dims are multiples of 64 in every published model
QUANTIZED_BITS, QUANTIZED_GROUP = 8, 64

KeysOrValues = mx.array | Packed


class KVBuffer:
    """Keys and values of `written` tokens in arrays [B, H, capacity, ...] that grow at their end only.

    The first of them may be another cache's, the `base`; such a buffer is read, and forked before it grows.
    """

    def __init__(self, parts: list[mx.array] | None = None, written: int = 0, base: "KVCache | None" = None):
        self.parts = parts or []
        self.written = written
        self.base = base

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
        """Make room for `count` more tokens and count them as written; `like` gives the parts' shapes."""
        start, self.written = self.written, self.written + count
        self.parts = [
            _with_room(part, piece, start, self.written)
            for part, piece in zip(self.parts or [None] * len(like), like, strict=True)
        ]

    def fork(self, length: int) -> "KVBuffer":
        """Return a new buffer with copies of the first `length` tokens, and room for more."""
        return KVBuffer([_copy(part, GROWTH - length % GROWTH) for part in self.read(length)], length)

    def fork_after(self, base: "KVCache | None", length: int) -> "KVBuffer":
        """Return a new buffer with copies of the tokens from the end of `base` to `length`, computed."""
        start = base.length if base else 0
        own = [_copy(part[:, :, start:], 1) for part in self.read(length)]
        mx.eval(own)  # so that this buffer can be freed
        return KVBuffer(own, length, base)

    def read(self, length: int) -> list[mx.array]:
        """Return the first `length` tokens, each [B, H, length, ...]; views where there is no base."""
        stretches: list[list[mx.array]] = []  # the last tokens first
        buffer: KVBuffer | None = self
        while buffer is not None:
            start = buffer.base.length if buffer.base else 0
            if length > start:
                stretches.append([part[:, :, : length - start] for part in buffer.parts])
                length = start
            buffer = buffer.base.buffer if buffer.base else None
        if len(stretches) < 2:
            return stretches[0] if stretches else [part[:, :, :0] for part in self.parts]
        return [mx.concatenate(list(pieces), axis=2) for pieces in zip(*reversed(stretches), strict=True)]


def _copy(part: mx.array, spare: int) -> mx.array:
    """Return a copy of `part` [B, H, T, ...] with room for `spare` more tokens.

    Without any room MLX might return a view, whose memory is written by others.
    """
    batch, heads, _, dim = part.shape
    return mx.concatenate([part, mx.zeros((batch, heads, spare, dim), part.dtype)], axis=2)


def _with_room(buffer: mx.array | None, new: mx.array, used: int, needed: int) -> mx.array:
    """Return `buffer` with a capacity of `needed` tokens at least, of which the first `used` are kept."""
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
    """Keys and values [B, H, T, D] of an attention layer's first `length` tokens; 8-bit if `quantized`.

    After pictures the next token's position differs from `length` by `shift`. While tokens of a picture are
    read, `axes` [3, T] has their positions.
    """

    quantized: bool = False
    buffer: KVBuffer = field(default_factory=KVBuffer)
    length: int = 0
    shift: int = 0
    axes: mx.array | None = None

    @property
    def place(self) -> mx.array:
        """The position [] of the next token, or those of the tokens that are read, [3, T]."""
        return mx.array(self.length + self.shift) if self.axes is None else self.axes

    def append(self, keys: mx.array, values: mx.array) -> tuple[KeysOrValues, KeysOrValues]:
        """Append keys and values [B, H, T, D]; return all so far [B, H, length, D]."""
        if not self.quantized:
            self.write([keys, values])
            k, v = self.buffer.read(self.length)
            return k, v
        packed = [mx.quantize(x, QUANTIZED_GROUP, QUANTIZED_BITS) for x in (keys, values)]
        self.write([part for parts in packed for part in parts])
        k, k_scales, k_biases, v, v_scales, v_biases = self.buffer.read(self.length)
        return _packed(k, k_scales, k_biases), _packed(v, v_scales, v_biases)

    def write(self, parts: list[mx.array]) -> None:
        """Append keys and values in the buffer's own form, each part [B, H, T, ...]."""
        self._fork_if_behind()
        self.length += parts[0].shape[2]
        self.buffer.write(parts)

    def extend(self, count: int, like: list[mx.array]) -> list[mx.array]:
        """Append `count` tokens, which the caller writes into the returned parts [B, H, capacity, ...]."""
        self._fork_if_behind()
        self.length += count
        self.buffer.make_room(count, like)
        mx.eval(self.buffer.parts)
        return self.buffer.parts

    def _fork_if_behind(self) -> None:
        if self.length != self.buffer.written or self.buffer.base is not None:
            self.buffer = self.buffer.fork(self.length)

    def share(self, other: "KVCache") -> None:
        """Take the first tokens from `other`, which has read the same ones; keep only those it lacks."""
        if other.length >= self.length:
            self.buffer = other.buffer
        elif (base := self.buffer.base) is None or base.length < other.length:
            self.buffer = self.buffer.fork_after(other, self.length)

    def trim(self, count: int) -> None:
        """Drop the last `count` tokens, appended since the last copy: their room is written again."""
        self.length -= count
        self.buffer.written = self.length

    def copy(self) -> "KVCache":
        return KVCache(self.quantized, self.buffer, self.length, self.shift)

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def arrays(self) -> list[mx.array]:
        return self.buffer.parts


def _packed(weight: mx.array, scales: mx.array, biases: mx.array) -> Packed:
    return Packed(weight, scales, biases, QUANTIZED_GROUP, QUANTIZED_BITS, "affine")


class Speculative(Protocol):
    """What a delta net keeps of tokens that may be rolled back: enough for the states after any of them."""

    def commit(self, state: "DeltaState", count: int) -> None:
        """Move `state` on by the first `count` of the tokens."""
        ...


class SpeculativeTokens(NamedTuple):
    """Inputs of the rule, from which the states after any token are computed.

    window [B, K-1+T, channels]; keys [B, T, Hk, Dk], log decays [B, T, Hv], updates [B, T, Hv, Dv].
    """

    window: mx.array
    keys: mx.array
    decays: mx.array
    updates: mx.array

    def commit(self, state: "DeltaState", count: int) -> None:
        window, *rest = self
        width = state.conv.shape[1]
        state.conv = mx.contiguous(window[:, count : count + width])  # [B, K-1, channels]
        state.state = state_after(state.state, *(part[:, :count] for part in rest))


class SpeculativeStates(NamedTuple):
    """The states after each token: convs [T, K-1, channels] and states [T, Hv, Dk, Dv]."""

    convs: mx.array
    states: mx.array

    def commit(self, state: "DeltaState", count: int) -> None:
        state.conv, state.state = self.convs[count - 1 : count], self.states[count - 1 : count]


@dataclass
class DeltaState:
    """The last K-1 convolution inputs [B, K-1, channels] and the recurrent state [B, Hv, Dk, Dv], float32.

    Both may be written in place while `private` is `state`: then no copy shares them. While `lent` is `state`
    they are not this state's own, and their owner may write them as soon as this state has others.
    """

    conv: mx.array
    state: mx.array
    speculative: Speculative | None = None
    private: mx.array | None = None
    lent: mx.array | None = None

    def commit(self, count: int) -> None:
        """Commit the first `count` of the speculative tokens; roll back the rest.

        Raises ValueError where none were read.
        """
        if self.speculative is None:
            raise ValueError("no speculative tokens were read, so none can be committed")
        self.speculative.commit(self, count)
        self.speculative = None

    def detach(self) -> None:
        """Give up what a slice keeps alive: the states after tokens that were rolled back."""
        if self.private is not self.state and self.lent is not self.state:
            self.conv, self.state = mx.contiguous(self.conv), mx.contiguous(self.state)

    def copy(self) -> "DeltaState":
        give_back([self])
        self.private = None
        return DeltaState(self.conv, self.state)

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.state.nbytes

    def arrays(self) -> list[mx.array]:
        return [self.conv, self.state]


def give_back(states: Sequence[DeltaState]) -> None:
    """Let `states` have arrays of their own in place of lent ones, computed."""
    lent = [state for state in states if state.lent is state.state]
    for state in lent:
        state.conv, state.state = state.conv * 1, state.state * 1
    if lent:
        mx.eval([array for state in lent for array in state.arrays()])


LayerCache = KVCache | DeltaState


@dataclass
class Cache:
    """The caches of all layers for one sequence of `length` tokens.

    `hidden` is the hidden state [1, 1, hidden] after the last token, from which the next one is predicted.
    `draft` holds what the draft head has read: the last tokens before position `draft_end`, or none.
    """

    layers: list[LayerCache]
    length: int = 0
    hidden: mx.array | None = None
    draft: KVCache = field(default_factory=KVCache)
    draft_end: int = 0

    @classmethod
    def empty(cls, config: ModelConfig, dtype: mx.Dtype, *, quantized: bool = False) -> "Cache":
        """Return a cache that has read nothing. Raises UsageError where head_dim cannot be packed."""
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
        """Return a cache that later reads leave as it is; no array is copied, but for those that are lent."""
        self.give_back()  # all at once
        layers = [layer.copy() for layer in self.layers]
        return Cache(layers, self.length, self.hidden, self.draft.copy(), self.draft_end)

    def give_back(self) -> None:
        """Have states of its own in place of lent ones."""
        give_back([layer for layer in self.layers if isinstance(layer, DeltaState)])

    def share(self, other: "Cache") -> None:
        """Share keys and values with `other`, which has read the beginning of this cache's ids, or more."""
        for layer, twin in zip(self.layers, other.layers, strict=True):
            if isinstance(layer, KVCache) and isinstance(twin, KVCache):
                layer.share(twin)

    def own(self) -> None:
        """Copy keys and values that other caches share into buffers of exactly this cache's length."""
        for layer in self.layers:
            if isinstance(layer, KVCache) and layer.length:
                layer.buffer = layer.buffer.fork_after(None, layer.length)

    def reclaim(self) -> None:
        """Write what comes next in place of what its buffers hold after this cache's tokens.

        No other cache may read that any more.
        """
        for layer in self.layers:
            if isinstance(layer, KVCache) and layer.buffer.base is None:
                layer.buffer.written = layer.length

    def drop_states(self) -> None:
        """Keep keys and values alone, for the caches that share them."""
        nothing = mx.zeros((0,))
        self.layers = [
            DeltaState(nothing, nothing) if isinstance(layer, DeltaState) else layer for layer in self.layers
        ]
        self.hidden, self.draft, self.draft_end = None, KVCache(), 0

    def take_states(self, other: "Cache") -> None:
        """Take everything but keys and values from `other`, which has read the same ids."""
        twin = Cache.copy(other)
        self.layers = [
            new if isinstance(new, DeltaState) else old
            for old, new in zip(self.layers, twin.layers, strict=True)
        ]
        self.hidden, self.draft, self.draft_end = twin.hidden, twin.draft, twin.draft_end

    def buffers(self) -> list[KVBuffer]:
        """Return the buffers of this cache's keys and values, without those that they are based on."""
        return [layer.buffer for layer in (*self.layers, self.draft) if isinstance(layer, KVCache)]

    def commit(self, count: int, read: int) -> None:
        """Commit the first `count` of `read` speculative tokens; roll back the rest.

        `hidden` is left to the caller.
        """
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                layer.commit(count)
            else:
                layer.trim(read - count)
        self.length -= read - count

    @property
    def shift(self) -> int:
        """How far the next token's position is from `length`, after pictures."""
        return next((layer.shift for layer in self.layers if isinstance(layer, KVCache)), 0)

    @contextmanager
    def placed_at(self, positions: mx.array, shift: int) -> Iterator[None]:
        """Read tokens at `positions` [3, T]; those after them are at their index plus `shift`."""
        attending = [layer for layer in self.layers if isinstance(layer, KVCache)]
        for layer in attending:
            layer.axes = positions
        try:
            yield
        finally:
            for layer in attending:
                layer.axes, layer.shift = None, shift

    def shift_positions(self, shift: int) -> None:
        """Have the next tokens at their index plus `shift`."""
        for layer in self.layers:
            if isinstance(layer, KVCache):
                layer.shift = shift

    def detach(self) -> None:
        """Give up what slices of larger arrays keep alive, once no more tokens are rolled back."""
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                layer.detach()

    @property
    def quantized(self) -> bool:
        """Whether keys and values are packed."""
        return any(isinstance(layer, KVCache) and layer.quantized for layer in self.layers)

    @property
    def state_nbytes(self) -> int:
        """Bytes of recurrent and convolution states, which copies do not share."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, DeltaState))

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def arrays(self) -> list[mx.array]:
        own = [] if self.hidden is None else [self.hidden]
        return own + [a for layer in (*self.layers, self.draft) for a in layer.arrays()]


def _empty_state(config: ModelConfig, dtype: mx.Dtype) -> DeltaState:
    conv = mx.zeros((1, config.linear_conv_kernel_dim - 1, config.conv_dim), dtype)
    heads, key_dim = config.linear_num_value_heads, config.linear_key_head_dim
    state = mx.zeros((1, heads, key_dim, config.linear_value_head_dim), mx.float32)
    return DeltaState(conv, state)


def as_kv_cache(cache: LayerCache) -> KVCache:
    """Return `cache`, an attention layer's. Raises TypeError for a delta net's."""
    if not isinstance(cache, KVCache):
        raise TypeError("an attention layer needs a KVCache, and was given a DeltaState")
    return cache


def as_delta_state(cache: LayerCache) -> DeltaState:
    """Return `cache`, a delta net layer's. Raises TypeError for an attention layer's."""
    if not isinstance(cache, DeltaState):
        raise TypeError("a delta net layer needs a DeltaState, and was given a KVCache")
    return cache
