"""Planned bytes against MLX's own arrays, against the published sizes, and against Hugging Face's counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.layouts import body_specs, mtp_specs
from qchat.core.errors import ConfigError, UsageError
from qchat.core.machine.backend import mx
from qchat.core.quant.plan import (
    GB,
    GIB,
    as_json,
    load_config,
    main,
    make_plan,
    plan_variants,
    tensor_nbytes,
    vision_weights,
)
from qchat.core.quant.recipes import VARIANTS, Options, Recipe
from tests.checkpoints import tiny_config
from tests.paths import QWEN

CONFIGS = QWEN / "configs"
real = pytest.mark.skipif(not CONFIGS.exists(), reason="the published configs are not here")
# of the model cards; some are decimal and some binary gigabytes
CARDS = {
    "Qwen3.6-27B": {
        "UD-Q2_K_XL": 15,
        "UD-Q3_K_XL": 18,
        "NVFP4_K_XL": 21,
        "MXFP4_K_XL": 21,
        "UD-Q4_K_XL": 21,
        "UD-Q5_K_XL": 25,
        "UD-Q6_K_XL": 27,
        "MXFP8_K_XL": 29,
        "UD-Q8_K_XL": 30,
    },
    "Qwen3.5-9B": {
        "UD-Q2_K_XL": 5,
        "UD-Q3_K_XL": 6,
        "UD-Q4_K_XL": 8,
        "UD-Q5_K_XL": 9,
        "UD-Q6_K_XL": 9,
        "UD-Q8_K_XL": 10,
    },
    "Qwen3.6-35B-A3B": {"MXFP8_K_XL": 35},
}
SMALL_VISION = {
    "depth": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "out_hidden_size": 1024,
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [],
}
WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


def tiny(**shape: Any) -> ModelConfig:
    return ModelConfig.parse(tiny_config(**shape))


def published(model: str) -> ModelConfig:
    return load_config(CONFIGS / f"{model}.config.json")


@pytest.mark.slow
@real
@pytest.mark.parametrize("model", CARDS)
def test_published_sizes_are_met_within_a_gigabyte(model: str):
    plans = plan_variants(published(model), as_published=True)
    for variant, size in CARDS[model].items():
        total = plans[variant].total_bytes
        assert min(abs(total / GB - size), abs(total / GIB - size)) < 1, variant


@real
def test_the_27b_sizes_are_those_computed_from_the_published_files():
    config = published("Qwen3.6-27B")
    sizes = {2: 14.50, 3: 17.39, 4: 20.44, 5: 23.93, 6: 26.59, 8: 29.25}
    for bits, size in sizes.items():
        plan = make_plan(config, Options("unsloth", bits=bits, keep_bf16=True, mtp="drop"))
        assert plan.total_bytes / GIB == pytest.approx(size, abs=0.02)


@real
def test_8_bit_outputs_read_1_9_gb_less_per_token_than_bf16_ones():
    plans = [
        make_plan(published("Qwen3.6-27B"), Options("unsloth", 2, keep_bf16=kept)) for kept in (True, False)
    ]
    assert plans[0].total.read_nbytes - plans[1].total.read_nbytes == pytest.approx(1.9 * GB, rel=0.01)


@real
@pytest.mark.parametrize(
    ("model", "tensors", "weights"),
    [("Qwen3.6-27B", 333, 460_730_096), ("Qwen3.5-4B", 297, 333_514_240), ("Qwen3.5-0.8B", 153, 100_592_896)],
)
def test_vision_towers_have_the_parameters_of_hugging_faces_modules(model: str, tensors: int, weights: int):
    """The numbers are `sum(p.numel())` of transformers' Qwen3_5VisionModel made from these configs."""
    assert vision_weights(published(model)) == (tensors, weights)


def test_a_vision_tower_is_counted_kept_or_dropped():
    raw = {**tiny_config(), "vision_config": SMALL_VISION}
    config = ModelConfig.parse(raw)
    assert vision_weights(config) == (153, 100_592_896)
    kept, dropped = (make_plan(config, Options(vision=choice)) for choice in ("keep", "drop"))
    assert kept.total_bytes - dropped.total_bytes == 2 * 100_592_896
    assert kept.total.read_nbytes == dropped.total.read_nbytes
    assert vision_weights(ModelConfig.parse({**raw, "language_model_only": True})) is None


def test_a_deepstack_merger_is_one_more_merger_over_joined_patches():
    """Its layer norm is as wide as the joined patches, where the last merger's is as wide as one patch."""
    config = ModelConfig.parse(
        {**tiny_config(), "vision_config": {**SMALL_VISION, "deepstack_visual_indexes": [3, 7]}}
    )
    joined = 4 * 768
    merger = 2 * joined + joined * joined + joined + 1024 * joined + 1024
    assert vision_weights(config) == (153 + 12, 100_592_896 + 2 * merger)


@pytest.mark.parametrize("value", [None, 0, -1, 1 << 40, 2.5, True, "12", [1]])
@pytest.mark.parametrize("name", ["depth", "hidden_size", "patch_size", "num_position_embeddings"])
def test_a_bad_vision_config_is_refused_by_field(name: str, value: Any):
    config = ModelConfig.parse({**tiny_config(), "vision_config": {**SMALL_VISION, name: value}})
    with pytest.raises(ConfigError, match=f"vision_config: {name} is"):
        make_plan(config, Options())


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("variant", [*VARIANTS, "none"])
def test_planned_bytes_are_those_of_mlxs_arrays(variant: str, moe: bool):
    config = tiny(moe=moe, tied=False, **WIDE)
    options = VARIANTS.get(variant, Options(group_size=32))
    recipe, total = Recipe.build(options, config), 0
    for name, spec in (body_specs(config) | mtp_specs(config)).items():
        geometry = recipe.decide(name, spec.shape)
        dtype = mx.float32 if name.endswith(("A_log", "dt_bias")) else mx.bfloat16
        array = mx.zeros(spec.shape, dtype)
        arrays = (array,)
        if geometry is not None:
            arrays = mx.quantize(array, geometry.group_size, geometry.bits, geometry.mode)
        nbytes = sum(part.nbytes for part in arrays)
        assert tensor_nbytes(name, spec.shape, geometry) == nbytes, name
        total += nbytes
    assert make_plan(config, options).total_bytes == total


def test_the_rows_are_all_tensors_once():
    config = tiny(moe=True, tied=False, **WIDE)
    specs = body_specs(config) | mtp_specs(config)
    plan = make_plan(config, Options("unsloth"))
    assert plan.total.tensors == len(specs)
    assert len({(row.name, row.mode) for row in plan.rows}) == len(plan.rows)
    without = make_plan(config, Options("unsloth", mtp="drop"))
    assert plan.total.tensors - without.total.tensors == len(mtp_specs(config))
    assert plan.total.read_nbytes == without.total.read_nbytes


def test_a_token_reads_its_experts_and_one_row_of_the_embedding():
    config = tiny(moe=True, tied=False, **WIDE)
    rows = {row.name: row for row in make_plan(config, Options("unsloth")).rows}
    for name in ("experts gate/up", "experts down"):
        assert rows[name].read_nbytes == rows[name].nbytes * 2 // 4
    for name in ("shared expert down", "router", "lm_head", "delta qkv/z", "norms"):
        assert rows[name].read_nbytes == rows[name].nbytes
    assert rows["embed"].read_nbytes == rows["embed"].nbytes // config.vocab_size
    assert rows["mtp"].read_nbytes == 0


def test_a_tied_embedding_is_read_whole_because_it_is_the_head():
    rows = {row.name: row for row in make_plan(tiny(tied=True), Options("unsloth")).rows}
    assert rows["embed"].read_nbytes == rows["embed"].nbytes
    assert "lm_head" not in rows


def test_speed_is_bandwidth_over_bytes_read():
    plan = make_plan(tiny(), Options())
    assert plan.tokens_per_s(400) == pytest.approx(400e9 / plan.total.read_nbytes)
    for bandwidth in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--bandwidth is"):
            plan.tokens_per_s(bandwidth)


def test_the_json_of_a_plan_adds_up():
    plan = make_plan(tiny(), Options("unsloth", 4))
    report = json.loads(json.dumps(as_json(plan, 100)))
    assert report["total_bytes"] == sum(row["nbytes"] for row in report["classes"]) == plan.total_bytes
    assert report["bytes_per_token"] * report["tokens_per_s"] == pytest.approx(100 * GB)
    assert report["options"]["recipe"] == "unsloth"
    assert report["disk_bytes"] > report["total_bytes"]
    assert "tokens_per_s" not in as_json(plan)


def test_parts_that_the_config_does_not_mention_cannot_be_dropped():
    with pytest.raises(UsageError, match="--mtp drop would change nothing"):
        make_plan(tiny(mtp=False), Options(mtp="drop"))
    with pytest.raises(UsageError, match="--vision drop would change nothing"):
        make_plan(tiny(), Options(vision="drop"))
    assert all(row.name != "mtp" for row in make_plan(tiny(mtp=False), Options()).rows)


def test_one_command_prints_every_variant_of_several_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, moe in (("dense", False), ("experts", True)):
        (tmp_path / f"{name}.config.json").write_text(json.dumps(tiny_config(moe=moe, mtp=moe, **WIDE)))
    assert main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [model, variant] for model in ("dense", "experts") for variant in VARIANTS
    ]


def test_the_command_refuses_what_it_cannot_read_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([]) == 2
    assert main([str(tmp_path / "absent")]) == 3
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "absent" in errors[1]


def test_variants_with_our_defaults_are_smaller_than_as_published():
    config = replace(tiny(), mtp_num_hidden_layers=0)
    ours, cards = (plan_variants(config, as_published=flag) for flag in (False, True))
    assert all(ours[name].total_bytes < cards[name].total_bytes for name in VARIANTS)
