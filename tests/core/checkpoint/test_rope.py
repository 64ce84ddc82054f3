"""Rotary embeddings: the numbers of transformers for every spelling of the fields."""

import importlib.util
import json
from typing import Any

import numpy as np
import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.errors import ConfigError
from qchat.core.machine.backend import mx
from qchat.core.ops.rotary import Rotary
from tests.checkpoints import tiny_config
from tests.golden.make_logits import YARN, YARN_OLD
from tests.golden.make_rope import FILE, SIZES, transformers_rope, variants

GOLDEN = json.loads(FILE.read_text())
# two roundings of float32: torch's power is not always the nearest number
TOLERANCE = 2.5e-7
# at a million positions a frequency off by one rounding turns by another 0.06 radians
FAR = 1 << 20
needs_transformers = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="transformers or torch is not installed",
)


def parse(**fields: Any) -> ModelConfig:
    named: dict[str, Any] = {"rope_parameters": None, **fields}
    return ModelConfig.parse(tiny_config(flat=True) | named)


def check(fields: dict[str, Any], golden: dict[str, Any]) -> None:
    config = parse(**SIZES | fields)
    rotary = Rotary(config)
    wanted = np.array(golden["inv_freq"], np.float32)
    # MLX computes the plain frequencies itself, less exactly
    tolerance = TOLERANCE if rotary.is_scaled else 2e-6
    np.testing.assert_allclose(np.array(rotary.frequencies), wanted, rtol=tolerance)
    assert config.rope_attention_factor == pytest.approx(golden["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("case", GOLDEN, ids=[json.dumps(case["fields"])[:80] for case in GOLDEN])
def test_frequencies_and_factor_are_those_of_transformers(case: dict[str, Any]):
    check(case["fields"], case)


@needs_transformers
def test_the_committed_numbers_are_those_of_the_installed_transformers():
    for fields, case in zip(variants(), GOLDEN, strict=True):
        assert case["fields"] == fields
        assert transformers_rope(fields) == {name: case[name] for name in ("inv_freq", "attention_factor")}


def test_the_rotation_multiplies_positions_by_the_frequencies():
    config = parse(**SIZES, rope_parameters=YARN | {"partial_rotary_factor": 0.25})
    x = mx.random.normal((1, 1, 3, 256), key=mx.random.key(0))
    rotated = np.array(Rotary(config)(x, mx.array(FAR)), np.float64)[0, 0]
    angles = np.arange(FAR, FAR + 3)[:, None].astype(np.float32) * np.array(
        config.rope_frequencies, np.float32
    )
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    low, high = np.array(x, np.float64)[0, 0, :, :32], np.array(x, np.float64)[0, 0, :, 32:64]
    # MLX divides by wavelengths, which rounds once more
    np.testing.assert_allclose(rotated[:, :32], low * cos - high * sin, atol=0.3)
    assert np.median(np.abs(rotated[:, :32] - (low * cos - high * sin))) < 1e-3
    np.testing.assert_array_equal(rotated[:, 64:], np.array(x)[0, 0, :, 64:])


def test_yarn_makes_a_million_tokens_of_the_cards_262144():
    card = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144, "rope_theta": 1e7}
    assert parse(rope_parameters=card, max_position_embeddings=262144).max_position_embeddings == 1_048_576
    assert parse(rope_parameters=card, max_position_embeddings=2_000_000).max_position_embeddings == 2_000_000
    linear = {"rope_type": "linear", "factor": 4.0}
    assert parse(rope_parameters=linear, max_position_embeddings=8192).max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_type is 'llama3', wanted default"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type is"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling: type is 'longrope'"),
        ({"rope_scaling": {"type": "su", "rope_type": None}}, "type is 'su'"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', wanted an object"),
        ({"rope_parameters": 5}, "rope_parameters is 5, wanted an object"),
        ({"rope_parameters": []}, "rope_parameters is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention is"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is None, wanted a number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": None}}, "factor is None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor is '4'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is None"),
        ({"rope_parameters": YARN | {"factor": 0}}, "factor is 0"),
        ({"rope_parameters": YARN | {"factor": -1}}, "factor is -1"),
        ({"rope_parameters": YARN | {"factor": True}}, "factor is True"),
        ({"rope_parameters": YARN | {"factor": 10**400}}, "factor is 1000"),
        ({"rope_parameters": YARN | {"attention_factor": "x"}}, "attention_factor is 'x'"),
        ({"rope_parameters": YARN | {"attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_parameters": YARN | {"beta_fast": -1}}, "beta_fast is -1"),
        ({"rope_parameters": YARN | {"beta_slow": [1]}}, "beta_slow is"),
        ({"rope_parameters": YARN | {"mscale": "1", "mscale_all_dim": 1}}, "mscale is '1'"),
        ({"rope_parameters": YARN | {"truncate": "no"}}, "truncate is 'no'"),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_emb"),
        ({"rope_parameters": YARN | {"rope_theta": 1}}, "rope_theta is 1, wanted a number above 1"),
        ({"rope_parameters": {"rope_theta": 1e-300}}, "rope_theta is 1e-300"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        (
            {"rope_parameters": {"rope_theta": 1e7}, "rope_scaling": YARN_OLD},
            "rope_scaling is .* wanted nothing beside a rope_parameters that says otherwise",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_its_field(fields: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        parse(**fields)


def test_both_names_of_the_section_may_say_the_same():
    assert (
        parse(rope_parameters=YARN, rope_scaling=YARN).rope_frequencies
        == parse(rope_scaling=YARN).rope_frequencies
    )


def test_a_missing_theta_is_said():
    assert any("no rope_theta" in note for note in parse().notes)
    assert not parse(rope_theta=1e4).notes and not parse(rope_parameters={"rope_theta": 1e4}).notes
