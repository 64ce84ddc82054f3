"""The structures of `source/decode_step.c`, field by field, and addresses of MLX arrays to fill them with.

Whoever takes an address keeps the array alive and lets nothing move it.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

from ..checkpoint.packed import Packed
from ..machine.backend import mx

Fields = list[tuple[str, Any]]
DENSE_KINDS = {mx.float32: 0, mx.bfloat16: 1, mx.float16: 2}
PACKED_KINDS = {"affine": 3, "mxfp4": 4, "mxfp8": 5, "nvfp4": 6}


def _fields(kind: Any, names: str) -> Fields:
    return [(name, kind) for name in names.split()]


class Matrix(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "weight scales biases"),
        *_fields(c_int64, "rows columns"),
        *_fields(c_int32, "kind bits group scale_kind"),
    ]


class DeltaNet(ctypes.Structure):
    _fields_ = [
        *_fields(c_int32, "key_heads value_heads key_dim value_dim taps reserved"),
        *_fields(c_void_p, "conv norm log_a dt_bias"),
        *_fields(Matrix, "qkv z a b out"),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        *_fields(c_int32, "heads kv_heads dim rotary"),
        *_fields(c_void_p, "q_norm k_norm frequencies"),
        *_fields(Matrix, "q k v out"),
    ]


class FeedForward(ctypes.Structure):
    _fields_ = [
        *_fields(Matrix, "gate up down router shared_gate shared_expert_gate shared_up shared_down"),
        *_fields(c_int64, "experts top inner shared_inner renormalise"),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        ("attends", c_int64),
        *_fields(c_void_p, "input_norm post_norm"),
        ("delta", DeltaNet),
        ("attention", Attention),
        ("block", FeedForward),
    ]


class Network(ctypes.Structure):
    _fields_ = [
        *_fields(c_int64, "hidden vocabulary layers widest"),
        ("eps", c_float),
        ("reserved", c_int32),
        *_fields(c_void_p, "norm all"),
        *_fields(Matrix, "embedding head"),
    ]


class Memory(ctypes.Structure):
    """The state of a layer: `first` and `second` are keys and values, or a delta net's conv and state.

    The other pointers are those of a delta net's speculative tokens, or null.
    """

    _fields_ = [
        *_fields(c_void_p, "first second"),
        ("capacity", c_int64),
        *_fields(c_void_p, "window keys decays updates"),
    ]


SIZES = [ctypes.sizeof(kind) for kind in (Matrix, Layer, Network, Memory)]


def address(array: mx.array) -> int:
    """Where the numbers of an evaluated array without gaps begin. Raises ValueError for one with gaps."""
    view = memoryview(array)  # pyright: ignore[reportArgumentType]
    if not view.c_contiguous:
        raise ValueError(f"an array {array.shape} with gaps has no single address")
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Pinned:
    """Arrays whose addresses were taken: evaluated, without gaps, and kept."""

    def __init__(self):
        self._kept: list[mx.array] = []

    def address(self, array: mx.array) -> int:
        array = mx.contiguous(array)
        mx.eval(array)
        self._kept.append(array)
        return address(array)

    def floats(self, array: mx.array) -> int:
        """The address of its numbers as float32."""
        return self.address(array.astype(mx.float32))

    def matrix(self, weight: mx.array | Packed) -> Matrix:
        """A weight [N, K], or of experts [E, N, K], as it is. Raises ValueError for a dtype unknown to C."""
        if isinstance(weight, Packed):
            return self._packed(weight)
        if weight.dtype not in DENSE_KINDS:
            raise ValueError(f"weights are {weight.dtype}")
        return Matrix(
            weight=self.address(weight),
            rows=weight.size // weight.shape[-1],
            columns=weight.shape[-1],
            kind=DENSE_KINDS[weight.dtype],
            bits=8 * weight.dtype.size,
            group=1,
        )

    def _packed(self, weight: Packed) -> Matrix:
        affine = weight.biases is not None
        if affine and weight.scales.dtype not in DENSE_KINDS:
            raise ValueError(f"scales are {weight.scales.dtype}")
        return Matrix(
            weight=self.address(weight.weight),
            scales=self.address(weight.scales),
            biases=self.address(weight.biases) if weight.biases is not None else None,
            rows=weight.scales.size // weight.scales.shape[-1],
            columns=weight.shape[-1],
            kind=PACKED_KINDS[weight.mode],
            bits=weight.bits,
            group=weight.group_size,
            scale_kind=DENSE_KINDS[weight.scales.dtype] if affine else 0,
        )


def copied(array: mx.array) -> mx.array:
    """Return the same numbers in memory of their own, evaluated, without gaps."""
    array = mx.contiguous(array)
    copy = mx.zeros(array.shape, array.dtype)
    mx.eval(array, copy)
    ctypes.memmove(address(copy), address(array), array.nbytes)
    return copy
