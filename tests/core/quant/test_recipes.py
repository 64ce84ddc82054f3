"""Every row of the published recipe tables, the flags on top of them, and recipe files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.packed import AFFINE_BITS, Geometry
from qchat.core.errors import UsageError
from qchat.core.quant.recipe_file import BUILTIN, BUILTIN_FOLDER, Bits, read_recipe
from qchat.core.quant.recipes import VARIANTS, Options, Recipe, check_parts
from tests.checkpoints import tiny_config

BASES = (2, 3, 4, 5, 6, 8)
ROUTER = "affine 8-bit group 64"
DENSE = None
DENSE_FFN = ("layers.0.mlp.gate_proj", "layers.9.mlp.up_proj")
MOE_FFN = (
    "layers.0.mlp.switch_mlp.gate_proj",
    "layers.9.mlp.switch_mlp.up_proj",
    "layers.3.mlp.shared_expert.gate_proj",
    "layers.3.mlp.shared_expert.up_proj",
)
DOWN = ("layers.0.mlp.down_proj", "layers.9.mlp.down_proj")
MOE_DOWN = ("layers.0.mlp.switch_mlp.down_proj", "layers.3.mlp.shared_expert.down_proj")
ATTENTION = tuple(f"layers.3.self_attn.{name}_proj" for name in "qkv")
DELTA = ("layers.0.linear_attn.in_proj_qkv", "layers.0.linear_attn.in_proj_z")
DECAY = ("layers.0.linear_attn.in_proj_a", "layers.0.linear_attn.in_proj_b")
OUTPUTS = ("layers.3.self_attn.o_proj", "layers.0.linear_attn.out_proj")
ROUTERS = ("layers.0.mlp.gate", "layers.3.mlp.shared_expert_gate")
UNPACKED = (
    "layers.0.linear_attn.conv1d",
    "layers.0.linear_attn.norm",
    "layers.0.linear_attn.A_log",
    "layers.0.linear_attn.dt_bias",
    "layers.0.input_layernorm",
    "norm",
    "vision_tower.blocks.0.attn.qkv",
)
# of 16 layers those with a mixed recipe's high bits: first and last eighth, every third
MIXED_HIGH = {0, 1, 4, 7, 10, 13, 14, 15}


def pairs(*bits: int) -> list[tuple[int, int]]:
    return list(zip(BASES, bits, strict=True))


def config(*, moe: bool = False, tied: bool = False, layers: int = 16, **sizes: Any) -> ModelConfig:
    """A hybrid whose rows are multiples of every group."""
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4)
    wide = {"hidden_size": 256, "head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    inner = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    wide |= inner if moe else {"intermediate_size": 512}
    sizes = {"num_hidden_layers": layers, "layer_types": kinds, **wide, **sizes}
    return ModelConfig.parse(tiny_config(moe=moe, tied=tied, **sizes))


def decisions(options: Options, *, moe: bool = False, **shape: Any) -> dict[str, str | None]:
    found = Recipe.build(options, config(moe=moe, **shape)).decisions
    return {name: None if triple is None else str(triple) for name, triple in found.items()}


def affine(bits: int, group: int = 64) -> str:
    return f"affine {bits}-bit group {group}"


def check(options: Options, names: tuple[str, ...], wanted: str | None, *, moe: bool = False) -> None:
    found = decisions(options, moe=moe)
    assert {name: found[name] for name in names} == dict.fromkeys(names, wanted)


def unsloth(bits: int | None, **flags: Any) -> Options:
    return Options(recipe="unsloth", bits=bits, **flags)


@pytest.mark.parametrize(("base", "bits"), pairs(2, 3, 4, 5, 6, 8))
def test_unsloth_gate_and_up_get_the_base(base: int, bits: int):
    check(unsloth(base), DENSE_FFN, affine(bits))
    check(unsloth(base), MOE_FFN, affine(bits), moe=True)


@pytest.mark.parametrize(("base", "bits"), pairs(3, 4, 5, 6, 8, 8))
def test_unsloth_down_gets_one_bit_more(base: int, bits: int):
    check(unsloth(base), DOWN, affine(bits))
    check(unsloth(base), MOE_DOWN, affine(bits), moe=True)


@pytest.mark.parametrize(("base", "bits"), pairs(4, 5, 6, 8, 8, 8))
def test_unsloth_mixers_inputs_and_embedding_get_two_bits_more(base: int, bits: int):
    check(unsloth(base), (*ATTENTION, *DELTA, "embed_tokens"), affine(bits))


@pytest.mark.parametrize(("base", "bits"), pairs(5, 6, 8, 8, 8, 8))
def test_unsloth_head_gets_three_bits_more(base: int, bits: int):
    check(unsloth(base), ("lm_head",), affine(bits))


@pytest.mark.parametrize("recipe", BUILTIN)
def test_every_recipe_pins_routers_and_shared_expert_gates_to_8_bits(recipe: str):
    for options in (Options(recipe), Options(recipe, group_size=32)):
        check(options, ROUTERS, ROUTER, moe=True)


@pytest.mark.parametrize("flags", [{"bits": 8, "mxfp": True}, {"bits": 4, "mxfp": True}, {"mode": "nvfp4"}])
def test_routers_stay_affine_under_every_float_code(flags: dict[str, Any]):
    check(Options("unsloth", **flags), ROUTERS, ROUTER, moe=True)


@pytest.mark.parametrize("base", BASES)
def test_unsloth_outputs_and_decays_are_8_bit_or_kept_as_the_cards_did(base: int):
    check(unsloth(base), (*OUTPUTS, *DECAY), affine(8))
    check(unsloth(base, keep_bf16=True), (*OUTPUTS, *DECAY), DENSE)


@pytest.mark.parametrize("recipe", BUILTIN)
def test_convolutions_norms_decays_and_vision_are_never_packed(recipe: str):
    model = config(linear_conv_kernel_dim=64)
    recipe_of = Recipe.build(Options(recipe), model)
    assert [recipe_of.decide(name, (256, 64)) for name in UNPACKED] == [DENSE] * len(UNPACKED)


def test_unsloth_without_bits_has_base_3():
    assert decisions(unsloth(None)) == decisions(unsloth(3))


@pytest.mark.parametrize("base", BASES)
def test_mxfp_turns_4_and_8_bits_into_floats_but_for_embedding_head_and_routers(base: int):
    plain, promoted = decisions(unsloth(base), moe=True), decisions(unsloth(base, mxfp=True), moe=True)
    floats = {affine(4): "mxfp4 4-bit group 32", affine(8): "mxfp8 8-bit group 32"}
    for name, was in plain.items():
        stays = name in ("embed_tokens", "lm_head") or name.endswith(("gate",)) or name.startswith("mtp.")
        assert promoted[name] == (was if stays else floats.get(str(was), was)), name


def test_nvfp4_takes_the_4_bit_decisions_of_base_4():
    plain = decisions(unsloth(4), moe=True)
    wanted = {name: "nvfp4 4-bit group 16" if was == affine(4) else was for name, was in plain.items()}
    assert decisions(Options("unsloth", mode="nvfp4"), moe=True) == wanted
    assert set(wanted.values()) == {"nvfp4 4-bit group 16", affine(5), affine(6), affine(8)}


@pytest.mark.parametrize(
    ("flags", "four"), [({"mxfp": True}, "mxfp4 4-bit group 32"), ({"mode": "nvfp4"}, "nvfp4 4-bit group 16")]
)
def test_the_float_map_is_the_second_generations(flags: dict[str, Any], four: str):
    eight = "mxfp8 8-bit group 32"
    options = Options("unsloth", float_map=True, **flags)
    check(options, (*ATTENTION, *DELTA, *OUTPUTS, "lm_head"), eight)
    check(options, ("embed_tokens", *DECAY, "mtp.fc", "mtp.layers.0.mlp.down_proj"), DENSE)
    check(options, (*ROUTERS, "mtp.layers.0.mlp.gate"), DENSE, moe=True)
    dense, moe = decisions(options), decisions(options, moe=True)
    for layer in range(16):
        wanted = eight if layer >= 8 else four
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert dense[f"layers.{layer}.mlp.{name}"] == wanted
            assert moe[f"layers.{layer}.mlp.switch_mlp.{name}"] == wanted
            assert moe[f"layers.{layer}.mlp.shared_expert.{name}"] == wanted


@pytest.mark.parametrize(
    ("base", "one", "two", "three"),
    [(2, 3, 4, 5), (3, 4, 5, 6), (4, 5, 6, 8), (5, 6, 8, 8), (6, 8, 8, 8), (8, 8, 8, 8)],
)
def test_qwen3_5_raises_mixers_and_leaves_their_outputs_dense(base: int, one: int, two: int, three: int):
    options = Options("qwen3_5", bits=base)
    check(options, (*ATTENTION, *DELTA, *DECAY, "embed_tokens"), affine(two))
    check(options, DOWN, affine(one))
    check(options, ("lm_head",), affine(three))
    check(options, OUTPUTS, DENSE)
    check(options, DENSE_FFN, affine(base))


@pytest.mark.parametrize(("low", "high"), [(2, 6), (3, 4), (3, 6), (4, 6)])
def test_mixed_gives_its_high_bits_to_the_head_and_to_some_layers_values_and_downs(low: int, high: int):
    found = decisions(Options(f"mixed_{low}_{high}"))
    assert found["lm_head"] == affine(high)
    assert found["embed_tokens"] is DENSE
    for layer in range(16):
        assert found[f"layers.{layer}.mlp.down_proj"] == affine(high if layer in MIXED_HIGH else low)
        assert found[f"layers.{layer}.mlp.up_proj"] == affine(low)
    for layer in (3, 7, 11, 15):
        assert found[f"layers.{layer}.self_attn.v_proj"] == affine(high if layer in MIXED_HIGH else low)
        assert found[f"layers.{layer}.self_attn.k_proj"] == affine(low)


@pytest.mark.parametrize("base", BASES)
def test_no_recipe_is_the_base_everywhere(base: int):
    found = decisions(Options(bits=base))
    assert {triple for name, triple in found.items() if not name.startswith("mtp.")} == {affine(base)}


@pytest.mark.parametrize(("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_no_recipe_in_a_float_mode_is_that_mode_everywhere(mode: Any, bits: int, group: int):
    found = Recipe.build(Options(mode=mode), config())
    assert {t for name, t in found.decisions.items() if not name.startswith("mtp.")} == {
        Geometry(bits, group, mode)
    }
    assert found.default == Geometry(bits, group, mode)


@pytest.mark.parametrize("recipe", BUILTIN)
def test_the_mtp_head_is_8_bit_whatever_the_flags(recipe: str):
    found = decisions(Options(recipe, keep_bf16=True, group_size=32))
    assert {triple for name, triple in found.items() if name.startswith("mtp.")} == {affine(8)}


def test_a_tied_embedding_is_decided_by_its_own_name():
    found = decisions(unsloth(2), tied=True)
    assert found["embed_tokens"] == affine(4)
    assert "lm_head" not in found


def test_rows_that_are_no_multiple_of_the_group_stay_dense_and_it_is_said():
    model = config(intermediate_size=96)
    recipe = Recipe.build(unsloth(4), model)
    assert recipe.decisions["layers.0.mlp.down_proj"] is DENSE
    assert recipe.decide("layers.0.mlp.down_proj", (96,)) is DENSE
    assert recipe.notes == (
        "layers.0.mlp.down_proj and 15 more kept dense: rows of 96 are not a multiple of the group of "
        "affine 5-bit group 64",
        "mtp.layers.0.mlp.down_proj kept dense: rows of 96 are not a multiple of the group of "
        "affine 8-bit group 64",
    )
    assert Recipe.build(unsloth(4), config()).notes == ()


def test_the_group_size_is_that_of_decisions_without_one_of_their_own():
    found = decisions(unsloth(2, group_size=128))
    assert found["layers.0.mlp.gate_proj"] == affine(2, 128)
    assert found["layers.3.self_attn.o_proj"] == affine(8, 64)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_published_variant_is_possible_with_and_without_the_cards_flags(name: str):
    for options in (VARIANTS[name], replace(VARIANTS[name], keep_bf16=True, mtp="drop")):
        for moe in (False, True):
            recipe = Recipe.build(options, config(moe=moe))
            assert recipe.default in recipe.decisions.values()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            Options("mixed_2_6", mode="nvfp4"),
            "--q-mode nvfp4 would change nothing: the recipe mixed_2_6 gives no",
        ),
        (Options("mixed_2_6", mode="mxfp8"), "--q-mode mxfp8 would change nothing"),
        (
            Options("mixed_2_6", bits=2),
            "--q-bits 2 would change nothing: the recipe mixed_2_6 gives no matrix",
        ),
        (
            Options("mixed_3_6", mxfp=True),
            "--q-mxfp would change nothing: the recipe mixed_3_6 gives 4 or 8",
        ),
        (Options(bits=5, mxfp=True), "--q-mxfp would change nothing"),
        (Options(bits=4, mxfp=True, group_size=32), None),
        (Options(mode="mxfp4", group_size=32), "--q-group-size 32 would change nothing"),
        (unsloth(4, mode="nvfp4", mxfp=True), "two ways to choose a float code"),
        (unsloth(3, mode="nvfp4"), "--q-mode nvfp4 has 4 bits: --q-bits 3 contradicts it"),
        (unsloth(4, mode="nvfp4"), None),
        (unsloth(None, float_map=True), "--float-map needs --q-mxfp or --q-mode nvfp4"),
        (unsloth(None, float_map=True, mode="mxfp4"), "--float-map needs"),
        (
            unsloth(4, float_map=True, mxfp=True),
            "--q-bits 4 would change nothing: --float-map gives no matrix",
        ),
        (unsloth(4, float_map=True, mode="nvfp4"), "--q-bits 4 would change nothing"),
        (unsloth(None, float_map=True, mxfp=True, group_size=64), "--q-group-size 64 would change nothing"),
        (unsloth(None, float_map=True, mxfp=True, keep_bf16=True), None),
        (Options("qwen3_5", float_map=True, mxfp=True), "--float-map is a map of the recipe unsloth"),
        (Options("qwen3_5", keep_bf16=True), None),
        (Options("mixed_4_6", mode="nvfp4"), None),
        (unsloth(7), "--q-bits is 7, wanted one of 2, 3, 4, 5, 6, 8"),
        (unsloth(4, group_size=16), "--q-group-size is 16, wanted one of 32, 64, 128"),
        (Options("unslot"), "there is no recipe 'unslot'; did you mean unsloth?"),
        (Options("zzz"), "known are unsloth, qwen3_5"),
        (Options(mtp="yes"), "--mtp is 'yes', wanted one of keep, drop, split"),  # pyright: ignore
    ],
)
def test_flags_that_contradict_or_change_nothing_are_refused(options: Options, sentence: str | None):
    if sentence is None:
        Recipe.build(options, config())
        return
    with pytest.raises(UsageError) as caught:
        Recipe.build(options, config())
    assert sentence in str(caught.value)


def test_choices_about_parts_that_do_not_exist_are_refused():
    check_parts(Options(), mtp=False, vision=False)
    check_parts(Options(mtp="split", vision="drop"), mtp=True, vision=True)
    with pytest.raises(UsageError, match="--mtp split would change nothing: the model has no MTP head"):
        check_parts(Options(mtp="split"), mtp=False, vision=True)
    with pytest.raises(UsageError, match="--vision drop would change nothing"):
        check_parts(Options(vision="drop"), mtp=True, vision=False)


@given(st.integers(2, 12), st.booleans())
def test_bits_snap_up_to_what_mlx_packs(number: int, relative: bool):
    bits = Bits(number, relative).at(0)
    assert bits in AFFINE_BITS
    assert bits == 8 or (bits >= number and not any(number <= other < bits for other in AFFINE_BITS))


USERS = """
group_size = 32
[[rule]]
match = "layers.3.self_attn.v_proj"
mode = "nvfp4"
[[rule]]
match = ["*.down_proj", "*.up_proj"]
layers = ["first 2", "every 4 after 2"]
bits = "N + 2"
[[rule]]
match = "*.mlp.gate"
bits = 2
[[rule]]
match = "mtp.fc"
dense = true
[[rule]]
match = "*.v_proj"
bits = 6
group_size = 128
[[rule]]
match = "*"
bits = "N-1"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text)
    return str(path)


def test_a_users_recipe_has_the_power_of_the_built_in_ones(tmp_path: Path):
    options = Options(write(tmp_path, USERS), bits=4)
    found = decisions(options)
    assert found["layers.3.self_attn.v_proj"] == "nvfp4 4-bit group 16"
    assert found["layers.7.self_attn.v_proj"] == affine(6, 128)
    high = [layer for layer in range(16) if found[f"layers.{layer}.mlp.down_proj"] == affine(6, 32)]
    assert high == [0, 1, 5, 9, 13]
    assert found["layers.2.mlp.down_proj"] == found["lm_head"] == affine(3, 32)
    assert found["mtp.fc"] is DENSE
    assert found["mtp.layers.0.mlp.down_proj"] == affine(8)
    moe = Recipe.build(options, config(moe=True))
    assert str(moe.decisions["layers.0.mlp.gate"]) == ROUTER
    assert moe.notes == (
        f"the recipe {options.recipe} has a rule that decides no module of this model: *.mlp.gate",
    )


def test_a_built_in_file_copied_by_the_user_decides_the_same(tmp_path: Path):
    for name in BUILTIN:
        copy = write(tmp_path, (BUILTIN_FOLDER / f"{name}.toml").read_text())
        assert decisions(Options(copy)) == decisions(Options(name))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no rule, wanted 1 to 1000 [[rule]] tables"),
        ("rule = 3", "has the rule 3"),
        ("[[rule", "is not valid TOML"),
        ("a = " + "[" * 5000, "is not valid TOML"),
        ("[[rule]]\nbits = 4", "rule 1 has no match"),
        ('[[rule]]\nmatch = "*"', "rule 1 has no bits"),
        ('[[rule]]\nmatch = "*"\nbits = 7', "rule 1 has the bits 7, wanted 2, 3, 4, 5, 6, 8"),
        ('[[rule]]\nmatch = "*"\nbits = true', "rule 1 has the bits True"),
        ('[[rule]]\nmatch = "*"\nbits = "N*2"', "rule 1 has the bits 'N*2'"),
        ('[[rule]]\nmatch = "*"\nbits = [4]', "rule 1 has the bits [4]"),
        ('[[rule]]\nmatch = "*"\nmode = "mxfp4"\nbits = 8', "rule 1 has the bits 8, wanted 4"),
        (
            '[[rule]]\nmatch = "*"\nmode = "mxfp4"\ngroup_size = 64',
            "rule 1 has the group_size 64, wanted none",
        ),
        ('[[rule]]\nmatch = "*"\nmode = "int4"', "rule 1 has the mode 'int4'"),
        ('[[rule]]\nmatch = "*"\ndense = true\nbits = 4', "rule 1 has the bits 4, wanted none"),
        ('[[rule]]\nmatch = "*"\ndense = 1', "rule 1 has the dense 1, wanted true or false"),
        ('[[rule]]\nmatch = "*"\nbits = 4\nlayers = "first 1/0"', "rule 1 has the layers 'first 1/0'"),
        ('[[rule]]\nmatch = "*"\nbits = 4\nlayers = "first 2"', 'its last rule must have match = "*"'),
        ('[[rule]]\nmatch = "*.x"\nbits = 4', 'its last rule must have match = "*"'),
        ('[[rule]]\nmatch = "*"\nbits = 4\nbit = 2', "rule 1 has the unknown key 'bit'"),
        ('default_bits = 9\n[[rule]]\nmatch = "*"\nbits = 4', "has the default_bits 9"),
        ('[[rule]]\nmatch = "mtp.*"\nbits = 4', 'its last rule must have match = "*"'),
    ],
)
def test_a_bad_recipe_file_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str):
    with pytest.raises(UsageError) as caught:
        read_recipe(write(tmp_path, text))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_file_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"absent\.toml"):
        read_recipe(str(tmp_path / "absent.toml"))
