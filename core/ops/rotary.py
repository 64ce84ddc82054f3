"""Rotary position embedding of the first columns of each head, with the frequencies that a config asks for.

A factor on cosines and sines, as YaRN has, is the same factor on the columns before they are rotated. So it
belongs to the norms of queries and keys, and every form of the forward pass has it from there.
"""

import math

from ..checkpoint.config import ModelConfig
from ..machine.backend import mx


class Rotary:
    """The rotation that `config` describes."""

    def __init__(self, config: ModelConfig):
        self.dims, self.theta = config.rotary_dim, config.rope_theta
        self._factor = config.rope_attention_factor
        self._frequencies = mx.array(config.rope_frequencies) if config.rope_frequencies else None
        self._wavelengths = None if self._frequencies is None else 1 / self._frequencies

    def __call__(self, x: mx.array, offset: mx.array) -> mx.array:
        """Rotate the first columns of x [B, H, T, D], whose first position is `offset` []."""
        base = self.theta if self._wavelengths is None else None
        return mx.fast.rope(
            x, self.dims, traditional=False, base=base, scale=1.0, offset=offset, freqs=self._wavelengths
        )

    @property
    def is_scaled(self) -> bool:
        """Whether the frequencies are others than those of `theta`."""
        return self._frequencies is not None

    @property
    def frequencies(self) -> mx.array:
        """The radians per position of each pair, [dims / 2] float32, as MLX computes them."""
        if self._frequencies is not None:
            return self._frequencies
        half = self.dims // 2
        return mx.exp(mx.arange(0, -half, -1, mx.float32) * (math.log(self.theta) / half))

    def scale_norm(self, weight: mx.array) -> mx.array:
        """The weight [D] of a query or key norm with the attention factor on the rotated columns."""
        if self._factor == 1.0:
            return weight
        scaled = mx.where(mx.arange(weight.size) < self.dims, weight * self._factor, weight)
        mx.eval(scaled)
        return scaled
