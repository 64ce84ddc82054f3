"""One builder makes every model: of a folder, of given weights, of a rank's share, or the head alone."""

from pathlib import Path

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.weights import load_weights
from qchat.core.engine.loading import build_model, load_folder, load_head
from qchat.core.engine.ranks import Ranks
from qchat.core.machine.backend import mx
from qchat.core.model.network import Model
from tests.checkpoints import write_checkpoint

IDS = [(7 * i * i + 3 * i) % 250 for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, hv_ratio=3)
    return folder


def logits(model: Model) -> mx.array:
    return model.logits(model.hidden(IDS, model.new_cache()))


def test_a_model_built_from_weights_is_the_one_of_their_folder(folder: Path):
    config = ModelConfig.load(folder)
    loaded = load_folder(Model, folder, config)
    built = build_model(Model, config, load_weights(folder, config))
    assert mx.array_equal(logits(built), logits(loaded))
    assert loaded.plan is not None
    assert built.plan is None


def test_the_head_alone_makes_the_logits_of_the_whole_model(folder: Path):
    config = ModelConfig.load(folder)
    model = load_folder(Model, folder, config)
    hidden = model.hidden(IDS, model.new_cache())
    assert mx.array_equal(load_head(folder, config)(hidden)[0], model.logits(hidden))


def test_a_rank_builds_its_share_with_the_sums_of_its_group(folder: Path):
    config, ranks = ModelConfig.load(folder), Ranks(1, 2)
    whole = load_weights(folder, config)
    part = build_model(Model, config, whole, ranks=ranks)
    assert part.policy.sum == ranks.sum
    assert part.config.num_attention_heads == config.num_attention_heads // 2
    assert part.nbytes < 0.75 * whole.nbytes
    assert part.mtp is None
