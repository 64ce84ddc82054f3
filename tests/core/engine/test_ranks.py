"""A model split over two ranks computes what one process computes; one that cannot be split is refused."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.packed import Packed
from qchat.core.checkpoint.weights import load_weights
from qchat.core.engine.engine import Engine
from qchat.core.engine.launcher import follows, is_rank
from qchat.core.engine.ranks import Ranks, addresses, slice_for_rank
from qchat.core.errors import UsageError
from qchat.core.machine.backend import mx
from qchat.core.worker.wire import ModelInfo
from qchat.tui.chat.client import EngineClient, behind_launcher, shared_command
from tests.checkpoints import quantize_checkpoint, write_checkpoint
from tests.compare import relative_rms
from tests.paths import ROOT
from tests.run_async import run_async

IDS = [(7 * i * i + 3 * i) % 250 for i in range(40)]
SCRIPT = """
import sys
import numpy as np
from qchat.core import follow, follows
from qchat.core.engine.engine import Engine
target, *folders = sys.argv[1:]
if follows():
    follow()
    sys.exit()
for number, folder in enumerate(folders):
    np.save(f"{target}{number}.npy", np.array(Engine.load(folder).logits(eval(open(target + ".ids").read()))))
"""
# prints rank 0's conversation, and its error for a model that another rank refuses
TALK = """
import json, sys
from qchat.core import Session, follow, follows
from qchat.core.engine.engine import Engine
from qchat.core.errors import QchatError, UsageError
from qchat.core.engine.followers import _load_folder
def load(path):
    if "refused" in path:
        raise UsageError("no such model here")
    return _load_folder(path)
if follows():
    follow(load)
    sys.exit()
folder, refused = sys.argv[1:]
try:
    Engine.load(refused)
except QchatError as error:
    print(error)
session = Session(Engine.load(folder), temperature=0, enable_thinking=False, max_new_tokens=6)
replies = [session.send("hello").raw_text, session.send("and more").raw_text]
*_, again = session.retry()
events = session.edit(1, "something else")
next(events)
session.cancel()
*_, cancelled = events
session.switch(session.tree.nodes[3].number)
replies += [again.raw_text, cancelled.finish_reason, session.send("at last").raw_text]
print(json.dumps(replies), session.live.cache.length, again.prefilled_tokens)
"""
ALONE = TALK.replace("if follows():", "if False:")


# prints how many models and caches another rank holds after each of two loads and an unload
HOLD = """
import gc, sys
from qchat.core import follow, follows
from qchat.core.engine import followers
from qchat.core.worker.methods import EngineMethods
held = []
def execute(self, line, execute=followers._Follower.execute):
    answer = execute(self, line)
    if line[0] in ("load", "drop"):
        held.append((line[0], len(self._models), len(self._caches)))
    return answer
followers._Follower.execute = execute
if follows():
    follow()
    print(held)
    sys.exit()
from qchat.core.worker.protocol import Request
methods = EngineMethods(lambda event: None, lambda: False)
for _ in range(2):
    methods.call("load", Request.parse({"id": 1, "method": "load", "params": {"model": sys.argv[1]}}).params)
    methods.call("send", Request.parse({"id": 1, "method": "send", "params": {"text": "hello"}}).params)
methods.call("unload", {})
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
    """Run `script` in two ranks connected over loopback."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev"), "OPENBLAS_NUM_THREADS": "1"}
    launcher, *rest = shared_command(ranks=2)
    places = rest[: rest.index("--")]
    command = [launcher, "--backend", "ring", *places, "--", sys.executable, script, *arguments]
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_two_ranks_compute_the_logits_of_one(folders: list[Path], tmp_path: Path):
    script, target = tmp_path / "rank.py", tmp_path / "logits"
    script.write_text(SCRIPT)
    Path(f"{target}.ids").write_text(repr(IDS))
    run = launch(script, target, *folders)
    for number, folder in enumerate(folders):
        alone = Engine.load(folder).logits(IDS)
        found = Path(f"{target}{number}.npy")
        assert found.exists(), run.stderr
        assert relative_rms(np.load(found), np.array(alone)) <= 2e-5


@pytest.mark.slow
def test_a_conversation_on_rank_0_equals_the_one_of_a_single_process(folders: list[Path], tmp_path: Path):
    shutil.copytree(folders[0], tmp_path / "refused")
    together, alone = tmp_path / "together.py", tmp_path / "alone.py"
    together.write_text(TALK)
    alone.write_text(ALONE)
    run = launch(together, folders[0], tmp_path / "refused")
    wanted = subprocess.run(
        [sys.executable, alone, str(folders[0]), str(tmp_path / "refused")],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".dev")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    refusal, *replies = run.stdout.splitlines()
    assert refusal == "rank 1: no such model here", run.stderr
    assert replies == wanted.stdout.splitlines() != [], run.stderr + wanted.stderr


@pytest.mark.slow
def test_another_rank_holds_one_model_at_a_time(folders: list[Path], tmp_path: Path):
    script = tmp_path / "hold.py"
    script.write_text(HOLD)
    run = launch(script, folders[0])
    assert "('load', 1," in run.stdout, run.stderr
    assert "('load', 2," not in run.stdout
    assert "('drop', 0, 0)]" in run.stdout


def test_ranks_of_one_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "hosts").write_text('[["10.0.0.1:1"], ["10.0.0.2:1"], ["10.0.0.1:2"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    assert [Ranks(rank, 3).sharers() for rank in range(3)] == [2, 1, 2]
    assert addresses() == ["10.0.0.1", "10.0.0.2", "10.0.0.1"]
    monkeypatch.delenv("MLX_HOSTFILE")
    assert addresses() == []
    assert Ranks(0, 3).sharers() == 1


@pytest.mark.parametrize(("rank", "one", "led"), [("", False, False), ("0", True, False), ("1", True, True)])
def test_a_process_knows_whether_it_is_a_rank_and_follows(
    monkeypatch: pytest.MonkeyPatch, rank: str, one: bool, led: bool
):
    monkeypatch.delenv("MLX_RANK", raising=False)
    if rank:
        monkeypatch.setenv("MLX_RANK", rank)
    assert (is_rank(), follows()) == (one, led)


@pytest.mark.slow
def test_a_chat_on_rank_0_ends_with_all_ranks(folders: list[Path]):
    async def chat() -> tuple[ModelInfo, str, list[int]]:
        client = EngineClient(shared_command(ranks=2), behind_launcher())
        await client.start()
        loaded = await client.request("load", model=str(folders[0]), defaults={"max_new_tokens": 5})
        ranks = children(client.pid)
        result = await client.request("send", text="hello ❯")
        await client.stop()
        return loaded.model, result.state.turns[-1].question, ranks

    model, question, ranks = run_async(chat(), 300)
    assert model.nbytes < 0.75 * Engine.load(folders[0]).model.nbytes
    assert question == "hello ❯"
    assert len(ranks) == 2
    assert ended(ranks)


@pytest.mark.slow
def test_ranks_end_with_a_front_end_that_is_killed(folders: list[Path], tmp_path: Path):
    script = tmp_path / "front.py"
    script.write_text(FRONT)
    with subprocess.Popen(
        [sys.executable, script, str(folders[0])],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".dev")},
        stdout=subprocess.PIPE,
        text=True,
    ) as front:
        assert front.stdout
        launcher = int(front.stdout.readline())
        ranks = children(launcher)
        front.kill()
    assert len(ranks) == 2
    assert ended([launcher, *ranks])


FRONT = """
import asyncio, sys
from qchat.tui.chat.client import EngineClient, behind_launcher, shared_command
async def chat():
    client = EngineClient(shared_command(ranks=2), behind_launcher())
    await client.start()
    await client.request("load", model=sys.argv[1])
    print(client.pid, flush=True)
    await asyncio.sleep(100)
asyncio.run(chat())
"""


def children(pid: int) -> list[int]:
    """Return the running children of `pid`."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def ended(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(runs, pids))


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_the_command_answers_once_and_like_a_single_process(folders: list[Path], tmp_path: Path):
    script = tmp_path / "command.py"
    script.write_text("import sys; from qchat.tui.cli.main import main; sys.exit(main())")
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


def test_the_ranks_hold_equal_parts_that_add_up_to_the_model(folders: list[Path]):
    for folder in folders:
        config = ModelConfig.load(folder)
        whole = load_weights(folder, config)
        parts = [slice_for_rank(config, whole, Ranks(rank, 2))[1] for rank in range(2)]
        held = [sum(count(t) for t in part.tensors.values()) for part in parts]
        assert held[0] == held[1] < 0.75 * whole.parameters
        for name in ("layers.0.mlp.down_proj", "layers.0.mlp.switch_mlp.down_proj"):
            if isinstance(whole.tensors.get(name), mx.array):
                joined = mx.concatenate([part.tensors[name] for part in parts], axis=-1)  # pyright: ignore
                assert mx.array_equal(joined, whole.tensors[name])  # pyright: ignore


def count(tensor: mx.array | Packed) -> int:
    return tensor.scales.size * tensor.group_size if isinstance(tensor, Packed) else tensor.size


def test_heads_that_do_not_divide_evenly_are_refused_by_name(folders: list[Path]):
    config = ModelConfig.load(folders[0])
    weights = load_weights(folders[0], config)
    with pytest.raises(
        UsageError, match="5 ranks cannot share this model evenly: its num_attention_heads is"
    ):
        slice_for_rank(config, weights, Ranks(0, 5))


def test_groups_of_weights_are_never_split(tmp_path: Path):
    (tmp_path / "dense").mkdir()
    write_checkpoint(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", (4, 128, "affine"))
    config = ModelConfig.load(tmp_path / "packed")
    with pytest.raises(UsageError, match="groups of 128 weights would be split"):
        slice_for_rank(config, load_weights(tmp_path / "packed", config), Ranks(0, 2))
