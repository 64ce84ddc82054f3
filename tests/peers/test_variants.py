"""Every published variant, converted here: qchat and mlx-lm compute the same logits from the folder."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from qchat.core.allocation.allocate import Budget, allocate
from qchat.core.conversion.convert import UNQUANTIZED, Conversion, convert
from qchat.core.engine.engine import Engine
from qchat.core.machine.backend import mx
from qchat.core.quant.allocated import Allocation
from qchat.core.quant.recipe_file import RoundingMethod
from qchat.core.quant.recipes import VARIANTS, Options
from tests.checkpoints import write_checkpoint
from tests.compare import QTINY, needs_qtiny, relative_rms

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the peer's own imports
    pytest.importorskip("mlx_lm")
    load_model = pytest.importorskip("mlx_lm.utils").load_model

# both compute in float32 from the same packed values
TOLERANCE = 3e-5
TOKENS = 24
OTHERS = {
    "bf16": Options(recipe=UNQUANTIZED),
    "float map": Options(recipe="unsloth", mxfp=True, float_map=True),
    "keep-bf16": Options(recipe="unsloth", bits=3, keep_bf16=True),
    "mixed_2_6": Options(recipe="mixed_2_6"),
    "qwen3_5": Options(recipe="qwen3_5"),
    "split": Options(recipe="none", bits=4, mtp="split"),
}
CHOICES = {**VARIANTS, **OTHERS}
each_choice = pytest.mark.parametrize("name", CHOICES)


def compare(
    source: Path,
    folder: Path,
    options: Options,
    rounding: RoundingMethod | None = None,
    allocation: Allocation | None = None,
    calibration: Path | None = None,
) -> None:
    conversion = Conversion(
        source, folder, options, rounding=rounding, calibration=calibration, allocation=allocation
    )
    convert(conversion, lambda _: None)
    ids = np.random.default_rng(0).integers(0, 256, TOKENS).tolist()
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    expected = model(mx.array([ids]))[0]
    assert relative_rms(Engine.load(folder).logits(ids), expected) <= TOLERANCE


@each_choice
def test_a_mixture_of_experts_has_the_logits_of_mlx_lm(name: str, tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=True, num_experts=8, hidden_size=128, head_dim=64)
    compare(tmp_path / "raw", tmp_path / "new", CHOICES[name])


@needs_qtiny
@each_choice
def test_the_trained_model_has_the_logits_of_mlx_lm(name: str, tmp_path: Path):
    compare(QTINY, tmp_path / "new", CHOICES[name])


@pytest.mark.parametrize("rounding", [None, "gptq"])
@pytest.mark.parametrize("shape", [{}, {"moe": True, "num_experts": 8}])
def test_bits_chosen_under_a_budget_have_the_logits_of_mlx_lm(
    shape: dict, rounding: RoundingMethod | None, tmp_path: Path
):
    write_checkpoint(tmp_path / "raw", hidden_size=128, head_dim=64, **shape)
    text = "How deep is the well? Nobody has ever measured it, and nobody will.\n"
    (tmp_path / "short.txt").write_text(text * 2)
    (tmp_path / "long.txt").write_text(text * 8)
    options = Options(recipe="best")
    chosen = allocate(tmp_path / "raw", options, Budget(bits_per_weight=5), text=tmp_path / "short.txt")
    calibration = tmp_path / "long.txt" if rounding else None
    compare(tmp_path / "raw", tmp_path / "new", options, rounding, chosen, calibration)


ROUNDED = {
    "gptq": Options(recipe="unsloth", bits=3),
    "weighted mxfp4": Options(recipe="none", bits=4, mode="mxfp4"),
    "gptq mxfp4": Options(recipe="none", bits=4, mode="mxfp4"),
    "gptq nvfp4": Options(recipe="none", bits=4, mode="nvfp4"),
    "gptq mxfp8": Options(recipe="none", bits=8, mode="mxfp8"),
}


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("name", ROUNDED)
def test_every_rounding_has_the_logits_of_mlx_lm(name: str, moe: bool, tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=moe, hidden_size=128, head_dim=64)
    rounding: RoundingMethod = "gptq" if name.startswith("gptq") else "weighted"
    compare(tmp_path / "raw", tmp_path / "new", ROUNDED[name], rounding)


@needs_qtiny
def test_the_trained_model_rounded_with_compensation_has_the_logits_of_mlx_lm(tmp_path: Path):
    compare(QTINY, tmp_path / "new", ROUNDED["gptq"], "gptq")
