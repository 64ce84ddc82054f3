"""Fused kernels: compiled by a child process into the user's cache, used from then on, never waited for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qchat.core.engine import precompile
from qchat.core.engine.engine import Engine
from qchat.core.machine.backend import on_gpu
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms
from tests.paths import ROOT

pytestmark = pytest.mark.skipif(on_gpu(), reason="a GPU's kernels are compiled while loading")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
IDS = [5, 99, 17, 200, 3] * 40

# loads a model twice, before and after the kernels are made; {make} makes them
SCRIPT = """
import json, sys
from pathlib import Path
from qchat.core.engine.engine import Engine
from qchat.core.machine.backend import mx
folder, ids, make = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "make"
def logits(engine):
    cache = engine.model.new_cache()
    pieces = [ids[:-30], ids[-30:-9], ids[-9:-4], ids[-4:-2], ids[-2:-1], ids[-1:]]
    parts = [engine.model.hidden(piece, cache) for piece in pieces]
    return engine.model.logits(mx.concatenate(parts, axis=1)).tolist()
engine = Engine.load(folder)
before, at_first = logits(engine), engine.precompiler.loaded
if make:
    engine.precompiler.wait()
    assert engine.precompiler.begin() is None
then = engine.precompiler.loaded
print(json.dumps({"first": at_first, "then": then, "before": before, "after": logits(engine)}))
"""


def load_twice(folder: Path, make: str, cache: Path, temporary: Path, **variables: str) -> dict:
    path = os.pathsep.join([str(ROOT / ".dev"), *sys.path])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "TMPDIR": str(temporary),
        "XDG_CACHE_HOME": str(cache),
        "QCHAT_COMPILE": "auto",
        "QCHAT_BLAS": "off",
        **variables,
    }
    arguments = [str(folder), json.dumps(IDS), make]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    return json.loads(run.stdout)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("shape", [{}, {"moe": True, "num_experts": 8, "num_experts_per_tok": 3}])
def test_kernels_are_made_once_kept_with_the_users_caches_and_give_the_same_logits(tmp_path, shape):
    model, cache, temporary = tmp_path / "model", tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    write_checkpoint(model, **shape)
    fresh = load_twice(model, "make", cache, temporary)
    assert (fresh["first"], fresh["then"]) == (False, True)
    assert relative_rms(np.array(fresh["after"]), np.array(fresh["before"])) <= 2e-5
    later = load_twice(model, "", cache, temporary, PATH="/nowhere")  # whatever is missing would fail
    assert (later["first"], later["then"]) == (True, True)
    assert not list(temporary.iterdir())  # MLX looked nowhere else
    assert not list(cache.glob("qchat/cpu-kernels/*/work-*"))


def test_without_a_compiler_functions_run_plain_and_nothing_is_said(tmp_path):
    write_checkpoint(tmp_path / "model")
    (tmp_path / "temporary").mkdir()
    found = load_twice(tmp_path / "model", "make", tmp_path, tmp_path / "temporary", PATH="/nowhere")
    assert (found["first"], found["then"]) == (False, False)


def test_one_layer_of_each_kind_stands_for_all(tmp_path):
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"]
    write_checkpoint(tmp_path, num_hidden_layers=5, layer_types=kinds)
    engine = Engine.load(tmp_path)
    weights = precompile.load_weights(tmp_path, engine.config)
    assert precompile.distinct_layers(engine.config, weights.tensors) == [0, 2]
    part = precompile.excerpt(engine.config, weights, [0, 2], engine.model.policy)
    assert [type(layer) for layer in part.layers] == [type(engine.model.layers[n]) for n in (0, 2)]
    precompile.rehearse(part, range(2))


def test_a_second_process_does_not_compile_beside_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "model")
    engine = Engine.load(tmp_path / "model")
    kernels = precompile.kernels_for(engine.config, engine.model.policy)
    assert kernels is not None
    with (kernels.home / "lock").open("w") as lock:
        precompile.fcntl.flock(lock, precompile.fcntl.LOCK_EX)
        assert not precompile.precompile(tmp_path / "model")


def test_nothing_is_started_where_compiling_is_switched_off(tmp_path):
    write_checkpoint(tmp_path)
    engine = Engine.load(tmp_path)
    assert engine.precompiler is not None
    assert engine.precompiler.begin() is None
    assert not precompile.compile_for_later()
