"""Quantized matrices: MLX's packed words and scales; their shapes give the bits, group size and mode.

The triple in `config.json` is only a hint: some published files have one that fits no tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError, WeightsError
from ..machine.backend import mx
from ..quoting import printable
from .layouts import module_name

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
FLOAT_MODES: dict[tuple[int, int], Mode] = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}


@dataclass(frozen=True)
class Geometry:
    """MLX's triple: `bits` per weight, `group_size` weights of a row to a scale, and the `mode` of code."""

    bits: int
    group_size: int
    mode: Mode

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}-bit group {self.group_size}"


@dataclass(frozen=True)
class Packed:
    """A quantized matrix, or a stack of them.

    `weight` u32 [..., N, K * bits / 32]; `scales` [..., N, K / group_size] are u8, or floats in affine
    mode, which also has `biases` of the same shape and dtype.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: Mode

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.bits, self.group_size, self.mode)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.weight, self.scales) if self.biases is None else (self.weight, self.scales, self.biases)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def with_dtype(self, dtype: mx.Dtype) -> "Packed":
        """The same matrix with affine scales and biases in `dtype`, so that its products stay in it."""
        if self.biases is None:
            return self
        return replace(self, scales=self.scales.astype(dtype), biases=self.biases.astype(dtype))

    def dequantize(self, dtype: mx.Dtype | None = None) -> mx.array:
        """The matrix [..., N, K] in `dtype` (default: that of the scales, or bfloat16)."""
        own = self if dtype is None else self.with_dtype(dtype)
        return mx.dequantize(
            own.weight, own.scales, own.biases, self.group_size, self.bits, self.mode, dtype=dtype
        )


def solve_geometry(in_features: int, columns: int, scale_columns: int, *, affine: bool) -> Geometry:
    """The triple that packs rows of `in_features` weights into `columns` words with `scale_columns` scales.

    bits = 32 * columns / in_features and group = in_features / scale_columns are exact. Raises WeightsError
    if no mode fits; the caller adds the tensor's name.
    """
    bits, odd_bits = divmod(32 * columns, in_features)
    group, odd_group = divmod(in_features, scale_columns) if scale_columns else (0, 1)
    if odd_bits or odd_group:
        raise WeightsError(
            f"{columns} packed columns and {scale_columns} scales do not divide rows of {in_features} weights"
        )
    if affine and bits in AFFINE_BITS and group in AFFINE_GROUPS:
        return Geometry(bits, group, "affine")
    if not affine and (bits, group) in FLOAT_MODES:
        return Geometry(bits, group, FLOAT_MODES[bits, group])
    kind = "affine" if affine else "float"
    raise WeightsError(f"MLX has no {kind} quantization of {bits} bits in groups of {group}")


@dataclass(frozen=True)
class Hints:
    """What a config's `quantization` says of each module, as `str(Geometry)` or "dense"."""

    default: str | None
    modules: Mapping[str, str]

    def contradiction(self, name: str, geometry: Geometry) -> str | None:
        """What the config says about the canonical module `name`, or None if that is `geometry`."""
        claim = self.modules.get(name, self.default) or "nothing"
        return None if claim == str(geometry) else claim


def read_hints(quantization: Mapping[str, Any] | None, source: str) -> Hints:
    """Parse the `quantization` object of the config file `source`. Raises ConfigError for wrong types."""
    fields = quantization or {}
    if fields.get("quant_method", "fp8") != "fp8":
        method = printable(str(fields["quant_method"]))
        raise ConfigError(
            f"{source}: the weights are quantized by {method}, and qchat reads MLX's quantizations and FP8"
        )
    default = _hint(fields, {}, source) if "bits" in fields else None
    modules = {}
    for path, value in fields.items():
        if isinstance(value, dict):
            modules[module_name(path)] = _hint(value, fields, f"{source}: {printable(path)}")
        elif value is False:
            modules[module_name(path)] = "dense"
    return Hints(default, modules)


def _hint(fields: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> str:
    def field(name: str, kind: type, default: object) -> object:
        value = fields.get(name, defaults.get(name, default))
        if type(value) is not kind:
            found = f"quantization has the {name} {printable(repr(value))}"
            raise ConfigError(f"{source}: {found}, wanted {kind.__name__}")
        return value

    mode, bits, group = field("mode", str, "affine"), field("bits", int, None), field("group_size", int, 64)
    return f"{printable(str(mode))} {bits}-bit group {group}"
