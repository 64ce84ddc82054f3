"""Logits against mlx-lm on folders that mlx-lm itself converted, both with float32 activations."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qchat.core.engine.engine import Engine
from qchat.core.machine.backend import mx
from tests.checkpoints import write_checkpoint
from tests.compare import QTINY, needs_qtiny, relative_rms

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the peer's own imports
    mlx_lm = pytest.importorskip("mlx_lm")
    load_model = pytest.importorskip("mlx_lm.utils").load_model

# both compute in float32 from the same packed values; rounding those to bfloat16 would show as 5e-3
TOLERANCE = 3e-5
# one, a few and many rows are multiplied in different ways
ROWS = (1, 6, 40)
# what `mlx_lm.convert` is asked for
CONVERSIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "4-bit": {"quantize": True, "q_bits": 4, "q_group_size": 64},
    "2-bit": {"quantize": True, "q_bits": 2, "q_group_size": 32},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4"},
    "mixed_2_6": {"quantize": True, "quant_predicate": "mixed_2_6", "q_group_size": 64},
}
each_conversion = pytest.mark.parametrize("how", CONVERSIONS.values(), ids=CONVERSIONS.keys())


def compare(source: Path, folder: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert `source` to `folder`; both engines' logits on it must agree, our weights dense and packed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer's tokenizer classes
        mlx_lm.convert(str(source), str(folder), dtype="bfloat16", **how)
    ids = np.random.default_rng(0).integers(0, 256, max(ROWS)).tolist()
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    expected = model(mx.array([ids]))[0]
    for dense in ("on", "off"):
        monkeypatch.setenv("QCHAT_DENSE", dense)
        engine = Engine.load(folder)
        for rows in ROWS:
            error = relative_rms(engine.logits(ids[:rows]), expected[:rows])
            assert error <= TOLERANCE, f"QCHAT_DENSE={dense}, {rows} rows"


@each_conversion
def test_a_converted_dense_model_has_the_logits_of_mlx_lm(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_checkpoint(tmp_path / "raw", tied=False, hidden_size=128, head_dim=64)
    compare(tmp_path / "raw", tmp_path / "converted", how, monkeypatch)


@each_conversion
def test_a_converted_mixture_of_experts_has_the_logits_of_mlx_lm(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_checkpoint(tmp_path / "raw", moe=True, num_experts=8, hidden_size=128, head_dim=64)
    compare(tmp_path / "raw", tmp_path / "converted", how, monkeypatch)


@needs_qtiny
@pytest.mark.parametrize("name", ["bf16", "4-bit", "nvfp4", "mixed_2_6"])
def test_the_trained_model_converted_has_the_logits_of_mlx_lm(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compare(QTINY, tmp_path / "converted", CONVERSIONS[name], monkeypatch)
