"""The memory that pictures need: the tower's weights, and its activations for one picture."""

import math

from ..checkpoint.vision import VisionConfig, vision_specs
from .tower import SCORES_NBYTES

WEIGHT_NBYTES = 2  # bfloat16, as published


def tower_nbytes(config: VisionConfig) -> int:
    """Return the bytes of the tower's weights."""
    return WEIGHT_NBYTES * sum(map(math.prod, vision_specs(config).values()))


def transient_nbytes(config: VisionConfig, tokens: int, size: int) -> int:
    """Return the bytes to look at a picture of so many tokens, with activations of `size` bytes.

    The widest point of a block: the stream, queries, keys and values in float32 while they are turned, and
    the inner width of the MLP with what its activation takes.
    """
    count = tokens * config.spatial_merge_size**2
    widest = max(9 * config.hidden_size, 4 * config.intermediate_size)
    pixels = 3 * 4 * config.patch_values
    scores = min(4 * config.num_heads * count * count, 2 * SCORES_NBYTES)
    return count * (max(size, 4) * (2 * config.hidden_size + widest) + pixels) + scores
