"""The bytes of a model's weights that decoding one token reads."""

from dataclasses import replace
from pathlib import Path

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.weights import load_weights
from qchat.core.machine.backend import Policy, mx
from qchat.core.model.weight_traffic import step_nbytes
from tests.checkpoints import quantize_checkpoint, write_checkpoint

STORED = Policy(activations=mx.bfloat16, dense=False)
WIDENED = Policy(activations=mx.float32, dense=True)


def needed(folder: Path, policy: Policy) -> int:
    config = ModelConfig.load(folder)
    return step_nbytes(load_weights(folder, config).tensors, config, policy)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_every_matrix_but_the_table_and_the_draft_head(tmp_path: Path, tied: bool):
    write_checkpoint(tmp_path, tied=tied)
    config = ModelConfig.load(tmp_path)
    tensors = load_weights(tmp_path, config).tensors
    unread = () if tied else ("embed_tokens",)
    names = [name for name in tensors if not name.startswith("mtp.") and name not in unread]
    arrays = [tensor for name in names if isinstance(tensor := tensors[name], mx.array)]
    assert len(arrays) == len(names)
    assert needed(tmp_path, WIDENED) == sum(4 * array.size for array in arrays)
    assert needed(tmp_path, STORED) == sum(min(2, array.dtype.size) * array.size for array in arrays)


def test_packed_weights_are_read_packed_unless_they_are_kept_dense(tmp_path: Path):
    write_checkpoint(tmp_path / "raw")
    quantize_checkpoint(tmp_path / "raw", tmp_path / "packed", lambda _: (4, 32, "affine"))
    dense = needed(tmp_path / "raw", WIDENED)
    assert needed(tmp_path / "packed", WIDENED) == pytest.approx(dense, rel=0.01)
    # four bits and, for 32 of them, a scale and a bias of 16 bits: 5 of 16 bits
    assert needed(tmp_path / "packed", STORED) == pytest.approx(dense / 2 * 5 / 16, rel=0.05)


def test_of_the_experts_only_the_chosen_ones_are_read(tmp_path: Path):
    write_checkpoint(tmp_path, moe=True)
    config = ModelConfig.load(tmp_path)
    tensors = load_weights(tmp_path, config).tensors
    every = replace(config, num_experts_per_tok=config.num_experts)
    experts = sum(
        tensor.nbytes for name, tensor in tensors.items() if ".switch_mlp." in name and "mtp" not in name
    )
    left_out = step_nbytes(tensors, every, STORED) - step_nbytes(tensors, config, STORED)
    assert left_out == pytest.approx(experts * (1 - config.num_experts_per_tok / config.num_experts))
