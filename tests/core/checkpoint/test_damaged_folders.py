"""A model folder is downloaded, so any part of it may be damaged or hostile.

What is wrong with it is said in one sentence, quickly and in little memory.
"""

import os
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qchat.core.checkpoint.config import ModelConfig, load_generation_config
from qchat.core.checkpoint.weights import load_weights
from qchat.core.conversation.session import Engine
from qchat.core.errors import ModelError, QchatError
from tests.checkpoints import quantize_checkpoint, write_checkpoint
from tests.damaged_folders import DAMAGES, FIRST
from tests.damages import INDEX, WHOLE
from tests.paths import ROOT

SECONDS = 10.0  # of processor time
PEAK_NBYTES = 1 << 30
ALL = [(base, name) for base, table in DAMAGES.items() for name in table]
GREEDY = [
    "header length of 2**63",
    "huge shape",
    "embedding of 4 million rows",
    "embedding and head of 4 million rows",
    "embedding of 4 million rows in header and config",
    "embedding of 4 million rows with an id for the last",
    "norm of a billion weights",
    "conv1d of a billion taps",
    "header of millions of brackets",
    "header nested 100000 deep",
    "hidden_size of 10**12",
    "10**9 layers",
    "config of 200 MB",
    "tokenizer of 300 MB",
    "vocab_size of 10**10",
    "template that never ends",
    "template that doubles a string",
    "template that repeats a string",
    "template with a huge power",
    "template with a wide format",
]


def processor_seconds() -> float:
    """Return what this process and its ended children have used."""
    return sum(os.times()[:4])


def open_model(folder: Path) -> None:
    """Everything that reads a model folder before the first token."""
    engine = Engine.load(folder)
    messages = [{"role": "user", "content": "hi"}]
    engine.template.render(messages, add_generation_prompt=True, enable_thinking=False)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undamaged folder for each table."""
    root = tmp_path_factory.mktemp("good")
    write_checkpoint(root / "raw")
    write_checkpoint(root / "sharded", shards=2)
    quantize_checkpoint(root / "raw", root / "packed", (4, 32, "affine"))
    write_checkpoint(root / "experts", moe=True, experts="each")
    return root


@pytest.mark.parametrize("base", DAMAGES)
def test_the_folders_open_before_they_are_damaged(good, base):
    open_model(good / base)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "name"), ALL, ids=[name for _, name in ALL])
def test_a_damaged_folder_is_refused_in_one_sentence(good, tmp_path, base, name):
    folder = shutil.copytree(good / base, tmp_path / "model")
    damage, says = DAMAGES[base][name]
    damage(folder)
    started = processor_seconds()
    with pytest.raises(QchatError) as caught:
        open_model(folder)
    assert processor_seconds() - started < SECONDS
    message = str(caught.value)
    assert isinstance(caught.value, ModelError)
    assert caught.value.exit_code == 3
    assert message.isprintable()
    assert 20 < len(message) < 800
    assert re.search(says, message), message


@pytest.mark.parametrize("file", [WHOLE, FIRST, INDEX, "config.json", "generation_config.json"])
def test_flipped_bits_give_a_sentence_or_a_model_and_never_anything_else(good, tmp_path, file):
    """In a shard the bits of its header are flipped: those of the data only change numbers."""
    folder = shutil.copytree(good / ("sharded" if file in (FIRST, INDEX) else "raw"), tmp_path / "model")
    content = (folder / file).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little") if file.endswith(".safetensors") else len(content)
    draw = random.Random(file)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[draw.randrange(end)] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(damaged)
        try:
            load_weights(folder, ModelConfig.load(folder))
            load_generation_config(folder)
        except ModelError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused > 0


def test_a_shard_cut_anywhere_is_refused_as_truncated(good, tmp_path):
    folder = shutil.copytree(good / "raw", tmp_path / "model")
    content = (folder / WHOLE).read_bytes()
    config = ModelConfig.load(folder)
    for size in random.Random(0).sample(range(len(content)), 40):
        (folder / WHOLE).write_bytes(content[:size])
        with pytest.raises(ModelError, match=f"{WHOLE} is truncated"):
            load_weights(folder, config)


@pytest.mark.slow
def test_greedy_folders_are_refused_in_little_memory(good, tmp_path):
    for name in GREEDY:
        DAMAGES["raw"][name][0](shutil.copytree(good / "raw", tmp_path / name))
    root = ROOT
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.core.checkpoint.test_damaged_folders import open_all; open_all()",
            *map(str, tmp_path.iterdir()),
        ],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root}/.dev:{root}"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, peak_nbytes = map(int, done.stdout.split())
    assert refused == len(GREEDY)
    assert peak_nbytes < PEAK_NBYTES


def open_all() -> None:
    """Print how many of the folders on the command line were refused, and the peak memory in bytes."""
    refused = 0
    for folder in map(Path, sys.argv[1:]):
        try:
            open_model(folder)
        except ModelError:
            refused += 1
    unit = 1 if sys.platform == "darwin" else 1024
    print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def test_a_path_that_no_file_can_have_is_refused():
    for name in ("x" * 5000, "x/" * 5000):
        with pytest.raises(ModelError, match="cannot be a model folder: File name too long"):
            ModelConfig.load(Path(name))
