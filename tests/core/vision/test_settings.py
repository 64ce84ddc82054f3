"""What a checkpoint says about pictures, checked field by field."""

from pathlib import Path
from typing import Any

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.vision import VisionConfig, vision_specs
from qchat.core.errors import ConfigError, UsageError
from qchat.core.vision.settings import PixelSettings
from tests.vision_checkpoints import PREPROCESSOR, seeing_config


def tower(**fields: Any) -> VisionConfig:
    found = VisionConfig.of(ModelConfig.parse(seeing_config(fields)))
    assert found is not None
    return found


def test_a_folder_without_the_file_has_the_published_budget(tmp_path: Path):
    settings = PixelSettings.load(tmp_path, tower(patch_size=16))
    assert (settings.min_pixels, settings.max_pixels) == (65_536, 16_777_216)
    assert settings.max_tokens == 16_384
    assert settings.mean == settings.std == (0.5, 0.5, 0.5)


def test_the_file_decides_and_older_names_win():
    assert PixelSettings.parse(PREPROCESSOR, "x", tower()).std == (0.5, 0.25, 0.2)
    older = {"min_pixels": 512, "max_pixels": 1024, "size": {"shortest_edge": 4}}
    settings = PixelSettings.parse(older, "x", tower())
    assert (settings.min_pixels, settings.max_pixels) == (512, 1024)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", 14),
        ("merge_size", 3),
        ("temporal_patch_size", 1),
        ("do_resize", False),
        ("do_normalize", "no"),
        ("resample", 2),
        ("size", 7),
        ("image_mean", [0.5]),
        ("image_std", [0.5, 0, 0.5]),
        ("max_pixels", -1),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any):
    with pytest.raises(ConfigError, match=f"here: {field} is"):
        PixelSettings.parse({**PREPROCESSOR, field: value}, "here", tower())


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_heads", 5), ("num_position_embeddings", 24), ("hidden_act", "relu"), ("in_channels", 1)],
)
def test_a_tower_that_cannot_be_computed_is_refused_by_field(field: str, value: Any):
    with pytest.raises(ConfigError, match=f"vision_config: {field} is"):
        tower(**{field: value}).check_supported()


def test_each_deepstack_block_adds_a_merger():
    plain, deep = (vision_specs(tower(deepstack_visual_indexes=blocks)) for blocks in ([], [0, 1]))
    assert deep.keys() - plain.keys() == {
        f"deepstack_merger_list.{place}.{name}.{part}"
        for place in (0, 1)
        for name in ("norm", "linear_fc1", "linear_fc2")
        for part in ("weight", "bias")
    }
    with pytest.raises(ConfigError, match="deepstack_visual_indexes"):
        tower(deepstack_visual_indexes=[2])


def test_fewer_tokens_can_be_asked_for_but_not_any_number():
    settings = PixelSettings.parse(PREPROCESSOR, "x", tower())
    assert settings.within(16).max_pixels == 16 * 64
    assert settings.within(10_000).max_pixels == settings.max_pixels
    for wrong in (0, 3, 1 << 20):
        with pytest.raises(UsageError, match="4 to 65,536 tokens"):
            settings.within(wrong)
