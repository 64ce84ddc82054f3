"""Who flushes subnormal numbers to zero: the processes that qchat owns; never a program that imports it."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from qchat.core.errors import UsageError
from qchat.core.machine import subnormals
from qchat.core.machine.backend import mx, on_gpu
from qchat.core.ops.attention import attention
from qchat.core.ops.elementwise import SMALLEST_EXPONENT, exp, masked_softmax
from qchat.core.ops.gated_delta import _exp_decays, _masks
from tests.paths import ROOT

cpu_only = pytest.mark.skipif(on_gpu(), reason="about the CPU's threads")
has_switch = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in subnormals.REGISTERS, reason="no known switch"
)

# 1e-20 squared is 1e-40; the sum of 64 of them is subnormal as well
PRODUCTS = """
import json
from qchat.core.machine.backend import mx
import numpy as np
small, square = np.full(1000, 1e-20, np.float32), mx.full((64, 64), 1e-20)
print(json.dumps({
    "numpy": float((small * small)[0]),
    "elementwise": (mx.array(small) * mx.array(small))[0].item(),
    "matmul": (square @ square)[0, 0].item(),
    "input": (mx.array([1e-40] * 8) * 1e10)[0].item(),
}))
"""


def products(before: str = "", **variables: str) -> dict[str, float]:
    path = os.pathsep.join([str(ROOT / ".dev"), *sys.path])
    script = "from qchat.core.machine import subnormals\n" + before + PRODUCTS
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


@cpu_only
def test_a_program_that_imports_the_runtime_keeps_its_subnormals():
    found = products()
    assert found["numpy"] == found["elementwise"] == pytest.approx(1e-40, rel=1e-4)
    assert found["matmul"] == pytest.approx(64e-40, rel=1e-4)
    assert found["input"] == pytest.approx(1e-30, rel=1e-4)


@cpu_only
@has_switch
@pytest.mark.parametrize(
    ("before", "variables"),
    [("subnormals.flush_process()", {}), ("", {"QCHAT_SUBNORMALS": "flush"})],
)
def test_a_process_that_asks_for_it_flushes_on_all_its_threads(before, variables):
    assert products(before, **variables) == {"numpy": 0, "elementwise": 0, "matmul": 0, "input": 0}


@cpu_only
def test_the_variable_overrides_a_process_that_asks():
    found = products("subnormals.flush_process()", QCHAT_SUBNORMALS="keep")
    assert min(found.values()) > 0


@cpu_only
@has_switch
def test_threads_started_while_flushing_go_on_flushing_and_this_one_does_not():
    """A one-shot run leaves the thread of its caller as it was, also when it is called inside a program."""
    before = """
with subnormals.flushing():
    from qchat.core.machine.backend import mx
    mx.eval(mx.zeros(1) + 1)
"""
    found = products(before)
    assert found["numpy"] == pytest.approx(1e-40, rel=1e-4)
    assert found["elementwise"] == found["matmul"] == found["input"] == 0


@has_switch
def test_the_thread_is_left_as_it_was():
    assert not subnormals.flushes()
    with subnormals.flushing():
        assert subnormals.flushes()
        with subnormals.flushing():
            pass
        assert subnormals.flushes()
    assert not subnormals.flushes()


@pytest.mark.parametrize("machine", ["riscv64", "s390x"])
def test_a_machine_without_a_known_switch_is_left_alone(monkeypatch, machine):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert not subnormals.flush_process()


def test_an_unknown_word_is_refused(monkeypatch):
    monkeypatch.setenv("QCHAT_SUBNORMALS", "perhaps")
    with pytest.raises(UsageError, match="QCHAT_SUBNORMALS is 'perhaps', wanted auto, flush, keep"):
        subnormals.flush_process()


def subnormal_share(x: mx.array) -> float:
    bits = np.array(x).view(np.uint32) & 0x7FFFFFFF
    return float(((bits > 0) & (bits < 0x800000)).mean())


@cpu_only
def test_masked_scores_become_zeros_and_no_subnormals():
    scores = mx.random.normal((2, 64, 64)) * 30
    mask = mx.where(mx.tri(64) > 0, 0.0, -1e30)
    weights = masked_softmax(scores, mask)
    assert subnormal_share(weights) == 0
    assert np.array(weights)[:, 0, 1:].max() == 0
    q = mx.random.normal((1, 4, 64, 32)) * 30
    assert subnormal_share(attention(q, q[:, :2], q[:, 2:], 1.0)) == 0


@cpu_only
def test_decays_become_zeros_and_no_subnormals():
    total = mx.cumsum(-mx.random.uniform(0, 20, (1, 2, 8, 32)), axis=-1)
    assert all(subnormal_share(part) == 0 for part in _exp_decays(total, *_masks(32)))


@cpu_only
def test_the_exponential_is_exact_above_its_cut_and_zero_below():
    x = np.linspace(-200, 88, 5000, dtype=np.float32)
    found, wanted = np.array(exp(mx.array(x))), np.exp(x.astype(np.float64))
    above = x >= SMALLEST_EXPONENT
    assert np.abs(found[above] / wanted[above] - 1).max() < 2e-7
    assert (found[~above] == 0).all()
