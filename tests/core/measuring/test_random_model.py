"""Random models are as large as converted ones, and compute finite numbers."""

from dataclasses import replace
from typing import Any

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.machine.backend import mx
from qchat.core.measuring.random_model import random_model, random_weights
from qchat.core.quant.plan import make_plan
from qchat.core.quant.recipes import VARIANTS
from tests.checkpoints import tiny_config

INNER: dict[str, Any] = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
DENSE = ModelConfig.parse(tiny_config(hidden_size=128), "tiny")
MOE = ModelConfig.parse(tiny_config(moe=True, hidden_size=128, **INNER), "tiny")


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("variant", ["UD-Q2_K_XL", "UD-Q5_K_XL", "NVFP4_K_XL", "MXFP8_K_XL"])
def test_logits_of_a_random_model_are_finite_and_of_unit_size(config, variant):
    model = random_model(config, VARIANTS[variant])
    logits = model.logits(model.hidden([1, 2, 3, 4, 5], model.new_cache()))
    assert mx.isfinite(logits).all()
    assert 0.5 <= float(logits.std()) <= 2
    assert (model.mtp is not None) == (config.mtp_num_hidden_layers > 0)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_packed_tensors_weigh_what_the_plan_says(config):
    options = replace(VARIANTS["UD-Q3_K_XL"], mtp="drop", vision="keep")
    weights = random_weights(config, options)
    plan = make_plan(config, options)
    # the loader delivers norms and decays in float32, which a converter stores in half the bytes
    narrow = sum(t.nbytes // 2 for t in weights.tensors.values() if isinstance(t, mx.array) and t.ndim == 1)
    kept_wide = sum(t.nbytes // 2 for n, t in weights.tensors.items() if n.endswith(("A_log", "dt_bias")))
    assert weights.nbytes - narrow + kept_wide == plan.total_bytes
    assert weights.parameters == plan.total.weights


def test_the_same_name_gives_the_same_numbers():
    first, second = (random_weights(DENSE, VARIANTS["UD-Q4_K_XL"]).tensors["norm"] for _ in range(2))
    assert isinstance(first, mx.array)
    assert isinstance(second, mx.array)
    assert mx.array_equal(first, second)
