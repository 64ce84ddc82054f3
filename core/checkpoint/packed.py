"""Quantized matrices: MLX's packed words and scales; their shapes give the bits, group size and mode.

The triple in `config.json` is only a hint: some published files have one that fits no tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError, WeightsError
from ..machine.backend import mx
from ..quoting import printable, quote_value
from .layouts import module_name

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# whose tensors have other names and other packings
FOREIGN_METHODS = (
    "aqlm", "awq", "bitnet", "bitsandbytes", "compressed-tensors", "eetq", "exl2", "exl3", "fbgemm_fp8",
    "gguf", "gptq", "higgs", "hqq", "modelopt", "quanto", "quark", "spqr", "torchao", "vptq",
)  # fmt: skip
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
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for: [..., N, K]."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.group_size)

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
class Claim:
    """What a config says of a module's geometry, as it stands there; None for what it leaves out."""

    bits: object = None
    group_size: object = None
    mode: object = None

    def fits(self, geometry: Geometry) -> bool:
        claimed = vars(self).items()
        return all(value is None or _is_same(value, getattr(geometry, name)) for name, value in claimed)

    def __str__(self) -> str:
        if None not in (self.bits, self.group_size, self.mode):
            mode = printable(str(self.mode)) if isinstance(self.mode, str) else quote_value(self.mode)
            return f"{mode} {quote_value(self.bits)}-bit group {quote_value(self.group_size)}"
        named = ((name, value) for name, value in vars(self).items() if value is not None)
        return " ".join(f"{name} {quote_value(value)}" for name, value in named) or "nothing"


@dataclass(frozen=True)
class Hints:
    """What a config's `quantization` says of all modules and of each; the shapes decide, whatever it is."""

    default: Claim
    modules: Mapping[str, Claim | None]  # None: it is not quantized

    def contradiction(self, name: str, geometry: Geometry) -> str | None:
        """What the config says about the canonical module `name`; None if that fits `geometry`."""
        claim = self.modules.get(name, self.default)
        if claim is None:
            return "dense"
        return None if claim.bits is not None and claim.fits(geometry) else str(claim)


def read_hints(quantization: Mapping[str, Any] | None, source: str) -> Hints:
    """Read the `quantization` object of the config file `source`. Raises ConfigError for foreign methods."""
    fields = quantization or {}
    if fields.get("quant_method") in FOREIGN_METHODS:
        raise ConfigError(
            f"{source}: the weights are quantized by {fields['quant_method']}, "
            "and qchat reads MLX's quantizations and FP8"
        )
    default = _read_claim(fields, Claim())
    modules = {module_name(path): default for path, value in fields.items() if value is True}
    modules |= {module_name(path): None for path, value in fields.items() if value is False}
    for path, value in fields.items():
        if isinstance(value, Mapping):
            modules[module_name(path)] = _read_claim(value, default)
    return Hints(default, modules)


def _read_claim(fields: Mapping[str, Any], default: Claim) -> Claim:
    found = {name: fields.get(name) for name in vars(default)}
    return Claim(**{name: vars(default)[name] if value is None else value for name, value in found.items()})


def _is_same(claimed: object, found: object) -> bool:
    return not isinstance(claimed, bool) and claimed == found  # 4.0 is 4
