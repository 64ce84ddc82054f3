"""Scales folded into a model leave what it computes unchanged, group by group."""

from dataclasses import replace

import numpy as np
import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.packed import Packed
from qchat.core.checkpoint.weights import load_weights
from qchat.core.conversion.awq import DEFAULT_GROUPS, GROUPS, groups
from qchat.core.machine.backend import choose_policy, mx
from qchat.core.model.network import Model
from qchat.core.quant.folds import Folds
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms

IDS = [(7 * i * i + 3 * i) % 250 for i in range(40)]


def logits(model: Model) -> mx.array:
    hidden = model.hidden(IDS, model.new_cache())
    return model.logits(hidden)


@pytest.mark.slow
@pytest.mark.parametrize("letter", GROUPS)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_fold_changes_weights_and_not_what_the_model_computes(tmp_path, moe, letter):
    write_checkpoint(tmp_path, moe=moe, hv_ratio=3, dtype=mx.float32)
    config = ModelConfig.load(tmp_path)
    weights = load_weights(tmp_path, config)
    random = np.random.default_rng(1)
    columns: dict[str, mx.array] = {}
    rows: dict[str, mx.array] = {}
    for group in groups(config, mtp=True):
        if group.letter != letter:
            continue
        reader = weights.tensors[group.readers[0]]
        assert isinstance(reader, mx.array)
        shape = [*(reader.shape[:1] if group.stacked else ()), reader.shape[-1]]
        scales = group.reduce(mx.array(random.uniform(0.3, 3.0, shape).astype(np.float32)))
        rows[group.feeder] = scales
        columns |= dict.fromkeys(group.readers, group.expand(scales))
    folds = Folds(None, columns, rows)
    folded = {
        name: tensor if isinstance(tensor, Packed) else folds.apply(name, tensor)
        for name, tensor in weights.tensors.items()
    }
    policy = choose_policy(weights.parameters)
    before = Model(config, weights, policy)
    after = Model(config, replace(weights, tensors=folded), policy)
    assert relative_rms(logits(after), logits(before)) <= 2e-5
    changed = [name for name, tensor in folded.items() if tensor is not weights.tensors[name]]
    assert set(changed) == {*columns, *rows}


def test_the_groups_that_are_scaled_by_default_are_known_ones():
    assert set(DEFAULT_GROUPS) < set(GROUPS)
