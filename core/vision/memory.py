"""The memory that pictures need: the tower's weights, and its activations for one picture."""

import math
from dataclasses import replace
from pathlib import Path

from ..checkpoint.config import ModelConfig
from ..checkpoint.vision import VisionConfig, vision_specs
from ..errors import DoesNotFit, UsageError
from ..model.memory_figures import MemoryPlan
from .settings import PixelSettings
from .tower import SCORES_NBYTES

WEIGHT_NBYTES = 2  # bfloat16, as published
GB = 10**9


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


def with_pictures(plan: MemoryPlan, folder: Path, tokens: int | None = None) -> MemoryPlan:
    """Return the plan of the model in `folder` with what its first picture takes besides.

    That is a picture of `tokens`, or for None of the most that the model gives one. Raises UsageError for a
    bad number or a model without a tower, DoesNotFit where a picture of `tokens` does not fit, ConfigError.
    """
    sizes = VisionConfig.of(ModelConfig.load(folder))
    if sizes is None:
        if tokens is not None:
            raise UsageError("this model sees no pictures: it has no vision tower")
        return plan
    most = PixelSettings.load(folder, sizes).within(tokens).max_tokens
    tower, activations = tower_nbytes(sizes), transient_nbytes(sizes, most, WEIGHT_NBYTES)
    left = plan.free_nbytes - (plan.total_nbytes - plan.snapshot_nbytes)
    if tokens is not None and plan.free_nbytes and tower + activations > left:
        raise DoesNotFit(
            f"a picture of {most:,} tokens needs {activations / GB:.1f} GB and the vision tower "
            f"{tower / GB:.1f} GB, and beside a context of {plan.context:,} tokens "
            f"{max(left, 0) / GB:.1f} GB are free: "
            "allow fewer tokens with --image-tokens, or a shorter context with --context"
        )
    return replace(plan, picture_tokens=most, picture_nbytes=tower + activations)
