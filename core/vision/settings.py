"""How a checkpoint wants its pictures prepared: `preprocessor_config.json` as a checked, frozen value.

The published checkpoints name `Qwen2VLImageProcessorFast`, whose bicubic filter is torchvision's. Refuses
other filters and steps left out.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.fields import Fields
from ..checkpoint.vision import VisionConfig
from ..errors import ConfigError, UsageError
from ..machine.files import read_json

FILE = "preprocessor_config.json"
# those of the published checkpoints
SHORTEST, LONGEST = 65_536, 16_777_216
MEAN = STD = (0.5, 0.5, 0.5)
BICUBIC = 3
MAX_PIXELS = 1 << 28
# the ids of so many tokens tell two pictures apart beyond doubt
LEAST_TOKENS = 4
MOST_TOKENS = 1 << 16


@dataclass(frozen=True)
class PixelSettings:
    """The sizes of patches, the least and most pixels of a resized picture, and the mean and deviation that
    normalise a channel of 0 to 1."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int = SHORTEST
    max_pixels: int = LONGEST
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def load(cls, folder: Path, tower: VisionConfig) -> "PixelSettings":
        """Read the file in `folder`; without one take what published checkpoints say. Raises ConfigError."""
        path = folder / FILE
        raw = read_json(path, ConfigError) if path.exists() else {}
        return cls.parse(raw, str(path), tower)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str, tower: VisionConfig) -> "PixelSettings":
        """Check `raw` against the sizes of `tower`. Raises ConfigError naming the field."""
        fields = Fields(raw, where)
        sizes = {
            "patch_size": tower.patch_size,
            "temporal_patch_size": tower.temporal_patch_size,
            "merge_size": tower.spatial_merge_size,
        }
        for name, size in sizes.items():
            if fields.integer(name, 1, 1 << 16, default=size) != size:
                raise fields.refuse(name, f"{size}, as in the config of the vision tower")
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not fields.flag(name, True):
                raise fields.refuse(name, "true")
        if fields.integer("resample", 0, 5, default=BICUBIC) != BICUBIC:
            raise fields.refuse("resample", f"{BICUBIC}, the bicubic filter")
        size = fields.section("size") if fields.values.get("size") is not None else Fields({}, where)
        unit = (tower.patch_size * tower.spatial_merge_size) ** 2
        shortest = fields.integer("min_pixels", 1, MAX_PIXELS, size.values.get("shortest_edge") or SHORTEST)
        longest = fields.integer("max_pixels", 1, MAX_PIXELS, size.values.get("longest_edge") or LONGEST)
        return cls(
            **sizes,
            min_pixels=max(shortest, LEAST_TOKENS * unit),
            max_pixels=max(longest, shortest, LEAST_TOKENS * unit),
            mean=_channels(fields, "image_mean", MEAN),
            std=_channels(fields, "image_std", STD),
        )

    @property
    def factor(self) -> int:
        """The pixels in a row or column of an image token."""
        return self.patch_size * self.merge_size

    @property
    def max_tokens(self) -> int:
        """The most tokens of a picture, but for one that is very long."""
        return self.max_pixels // self.factor**2

    def within(self, tokens: int | None) -> "PixelSettings":
        """Return these settings with at most `tokens` for a picture. Raises UsageError for a bad number."""
        if tokens is None:
            return self
        if not LEAST_TOKENS <= tokens <= MOST_TOKENS:
            raise UsageError(
                f"a picture can have {LEAST_TOKENS} to {MOST_TOKENS:,} tokens, and {tokens:,} were asked for"
            )
        most = min(self.max_pixels, tokens * self.factor**2)
        return replace(self, min_pixels=min(self.min_pixels, most), max_pixels=most)

    @property
    def digest(self) -> bytes:
        """What tells pixels that were normalised in different ways apart; budgets do not enter."""
        fields = {name: value for name, value in asdict(self).items() if not name.endswith("_pixels")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()


def _channels(fields: Fields, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    found = fields.values.get(name)
    if found is None:
        return default
    numbers = isinstance(found, list) and all(type(one) in (int, float) and 0 <= one <= 1 for one in found)
    if not numbers or len(found) != 3 or (name == "image_std" and not all(found)):
        raise fields.refuse(name, "three numbers from 0 to 1")
    return tuple(map(float, found))
