"""A model shared by two processes computes what one computes alone; what cannot be shared is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qchat.core.backend import mx
from qchat.core.config import ModelConfig
from qchat.core.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.packed import Packed
from qchat.core.ranks import Ranks, share
from qchat.core.weights import load_weights
from tests.checkpoints import quantize_checkpoint, write_checkpoint
from tests.compare import ROOT, relative_rms

IDS = [(7 * i * i + 3 * i) % 250 for i in range(40)]
SCRIPT = """
import sys
import numpy as np
from qchat.core.engine import Engine
from qchat.core.ranks import joined
target, *folders = sys.argv[1:]
ranks = joined()
for number, folder in enumerate(folders):
    logits = np.array(Engine.load(folder).logits(eval(open(target + ".ids").read())))
    if ranks.rank == 0:
        np.save(f"{target}{number}.npy", logits)
print(ranks.agree_text("said by rank 0" if ranks.rank == 0 else "not heard"))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Dense, mixture of experts, and dense with every matrix at 4 bits."""
    dense, moe, packed = (tmp_path_factory.mktemp(name) for name in ("dense", "moe", "packed"))
    write_checkpoint(dense, hv_ratio=3)
    write_checkpoint(moe, moe=True, hv_ratio=3)
    quantize_checkpoint(dense, packed, (4, 32, "affine"))
    return [dense, moe, packed]


def launch(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `script` in two processes that know each other over loopback."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev"), "OPENBLAS_NUM_THREADS": "1"}
    program = Path(sys.executable).with_name("mlx.launch")
    command = [program, "-n", "2", "--backend", "ring", "--", sys.executable, script, *arguments]
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120
    )


def test_two_ranks_compute_the_logits_of_one(folders: list[Path], tmp_path: Path):
    script, target = tmp_path / "rank.py", tmp_path / "logits"
    script.write_text(SCRIPT)
    Path(f"{target}.ids").write_text(repr(IDS))
    run = launch(script, target, *folders)
    assert run.stdout.count("said by rank 0") == 2, run.stderr
    for number, folder in enumerate(folders):
        alone = Engine.load(folder).logits(IDS)
        assert relative_rms(np.load(f"{target}{number}.npy"), np.array(alone)) <= 2e-5


def test_the_command_answers_once_and_as_it_would_alone(folders: list[Path], tmp_path: Path):
    script = tmp_path / "command.py"
    script.write_text("import sys; from qchat.tui.cli import main; sys.exit(main())")
    words = (folders[0], "-p", "hello", "--no-think", "--max-tokens", "5", "--temperature", "0", "--quiet")
    alone = subprocess.run(
        [sys.executable, script, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".dev")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    together = launch(script, *words)
    assert alone.returncode == 0
    assert together.stdout.strip() == alone.stdout.strip() != "", together.stderr


def test_the_ranks_hold_equal_parts_that_make_the_whole(folders: list[Path]):
    for folder in folders:
        config = ModelConfig.load(folder)
        whole = load_weights(folder, config)
        parts = [share(config, whole, Ranks(rank, 2))[1] for rank in range(2)]
        held = [sum(count(t) for t in part.tensors.values()) for part in parts]
        assert held[0] == held[1] < 0.75 * whole.parameters
        for name in ("layers.0.mlp.down_proj", "layers.0.mlp.switch_mlp.down_proj"):
            if isinstance(whole.tensors.get(name), mx.array):
                joined = mx.concatenate([part.tensors[name] for part in parts], axis=-1)  # pyright: ignore
                assert mx.array_equal(joined, whole.tensors[name])  # pyright: ignore


def count(tensor: mx.array | Packed) -> int:
    return tensor.scales.size * tensor.group_size if isinstance(tensor, Packed) else tensor.size


def test_what_does_not_divide_is_refused_by_name(folders: list[Path]):
    config = ModelConfig.load(folders[0])
    weights = load_weights(folders[0], config)
    with pytest.raises(
        UsageError, match="5 ranks cannot share this model evenly: its num_attention_heads is"
    ):
        share(config, weights, Ranks(0, 5))


def test_groups_of_weights_are_never_cut(tmp_path: Path):
    (tmp_path / "dense").mkdir()
    write_checkpoint(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", (4, 128, "affine"))
    config = ModelConfig.load(tmp_path / "packed")
    with pytest.raises(UsageError, match="groups of 128 weights would be cut"):
        share(config, load_weights(tmp_path / "packed", config), Ranks(0, 2))
