"""Models of any config with random weights, packed like a recipe's and made on the device; for timing only.

Nothing is quantized: codes are random bits, under scales that give each row about unit gain so that
activations stay finite. Each access to a tensor makes it anew; nothing is kept.
"""

import math
import zlib
from collections.abc import Iterator, Mapping

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import Spec, body_specs, mtp_specs
from ..checkpoint.packed import Geometry, Packed
from ..checkpoint.weights import Tensor, Weights
from ..engine.loading import build_model
from ..machine.backend import mx
from ..model.network import Model
from ..quant.recipes import Options, Recipe

# root mean square of uniform random codes: e2m1, and e4m3 without its lowest mantissa bit
E2M1_RMS, E4M3_RMS = 2.93, 93.0
E4M3_MASK = 0xFEFEFEFE  # that bit is set in every NaN
E8M0_BIAS = 127


def random_model(config: ModelConfig, options: Options) -> Model:
    """The model that converting with `options` would give, but for what it says. Raises UsageError."""
    return build_model(Model, config, random_weights(config, options))


def random_weights(config: ModelConfig, options: Options) -> Weights:
    """Return every tensor of `config` by canonical name, lazy. Raises UsageError as `random_model` does."""
    keeps_mtp = config.mtp_num_hidden_layers > 0 and options.mtp != "drop"
    specs = body_specs(config) | (mtp_specs(config) if keeps_mtp else {})
    return Weights(_RandomTensors(specs, Recipe.build(options, config)), (), keeps_mtp)


class _RandomTensors(Mapping[str, Tensor]):
    """Random tensors by canonical name; the same name always gives the same numbers."""

    def __init__(self, specs: Mapping[str, Spec], recipe: Recipe):
        self._specs, self._recipe = specs, recipe

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        key = mx.random.key(zlib.crc32(name.encode()))
        geometry = self._recipe.decide(name, spec.shape)
        if geometry is not None:
            return _packed(spec.shape, geometry, key)
        return _dense(name, spec, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def _dense(name: str, spec: Spec, key: mx.array) -> mx.array:
    noise = mx.random.normal(spec.shape, key=key)
    if spec.kind in ("norm", "plain_norm"):
        return 1 + 0.1 * noise
    if spec.kind == "vector":
        return noise - 2 if name.endswith("dt_bias") else mx.abs(noise)
    gain = 0.4 if spec.kind == "conv" else spec.shape[-1] ** -0.5
    return (gain * noise).astype(mx.bfloat16)


def _packed(shape: tuple[int, ...], geometry: Geometry, key: mx.array) -> Packed:
    """Draw uniform codes, and scale them so that the root mean square of weights is 1 / sqrt(K)."""
    columns, bits, group = shape[-1], geometry.bits, geometry.group_size
    word_shape = (*shape[:-1], columns * bits // 32)
    # a random key is two words of random bits
    count = math.prod(word_shape)
    words = mx.random.split(key, -(-count // 2)).flatten()[:count].reshape(word_shape)
    groups = (*shape[:-1], columns // group)
    rms = columns**-0.5
    if geometry.mode == "affine":
        scale = rms * math.sqrt(12) / 2**bits
        scales = (scale * mx.random.uniform(0.9, 1.1, groups, key=key)).astype(mx.bfloat16)
        return Packed(words, scales, scales * (-(2**bits - 1) / 2), group, bits, "affine")
    if geometry.mode == "nvfp4":
        scales = mx.to_fp8(mx.full(groups, rms / E2M1_RMS))
        return Packed(words, scales, None, group, bits, "nvfp4")
    code_rms = E2M1_RMS if bits == 4 else E4M3_RMS
    exponent = round(math.log2(rms / code_rms)) + E8M0_BIAS
    words = words if bits == 4 else words & E4M3_MASK
    return Packed(words, mx.full(groups, exponent, mx.uint8), None, group, bits, geometry.mode)
