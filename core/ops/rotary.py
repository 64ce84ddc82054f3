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
        self._sections = config.mrope_section
        self._frequencies = mx.array(config.rope_frequencies) if config.rope_frequencies else None
        self._wavelengths = None if self._frequencies is None else 1 / self._frequencies

    def __call__(self, x: mx.array, place: mx.array) -> mx.array:
        """Rotate the first columns of x [B, H, T, D] by the positions `place`.

        That is the first token's position [] or [1], or those of all tokens, [3, T]: moment, row and column.
        """
        if place.ndim == 2:
            return self._rotate_by_axes(x, place)
        base = self.theta if self._wavelengths is None else None
        return mx.fast.rope(
            x, self.dims, traditional=False, base=base, scale=1.0, offset=place, freqs=self._wavelengths
        )

    def _rotate_by_axes(self, x: mx.array, place: mx.array) -> mx.array:
        """Rotate x [B, H, T, D] by positions [3, T], of which each pair of columns takes one axis."""
        half = self.dims // 2
        axes = mx.array([_axis_of(pair, self._sections) for pair in range(half)])
        angles = place[axes].T.astype(mx.float32) * self.frequencies  # [T, dims / 2]
        cosines, sines = mx.cos(angles), mx.sin(angles)
        first, second, rest = mx.split(x, [half, self.dims], axis=-1)
        first, second = first.astype(mx.float32), second.astype(mx.float32)
        turned = [first * cosines - second * sines, second * cosines + first * sines]
        return mx.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)

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


def _axis_of(pair: int, sections: tuple[int, ...]) -> int:
    """Return which axis a pair of columns turns by: they alternate while an axis has pairs left."""
    axis = pair % 3
    return axis if axis and pair < 3 * sections[axis] else 0
