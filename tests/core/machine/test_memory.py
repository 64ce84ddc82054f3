"""How much memory there is, as the system says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qchat.core.machine.memory import host_available_nbytes, host_total_nbytes, model_limit_nbytes
from tests.paths import ROOT


def test_a_mac_gives_models_what_metal_recommends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    for gibibytes, share in ((16, 2 / 3), (36, 2 / 3), (64, 3 / 4)):
        pages = {"SC_PAGE_SIZE": 1 << 14, "SC_PHYS_PAGES": gibibytes << 16}
        monkeypatch.setattr(os, "sysconf", pages.get)
        assert model_limit_nbytes() == int((gibibytes << 30) * share)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is available")
def test_what_linux_can_give_is_a_part_of_what_it_has():
    assert 0 < host_available_nbytes() < host_total_nbytes()
    assert model_limit_nbytes() == host_total_nbytes() * 9 // 10


def test_a_system_that_says_nothing_gives_zero(monkeypatch: pytest.MonkeyPatch):
    def refuse(_path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert host_available_nbytes() == 0


def test_the_memory_is_read_without_mlx():
    script = "import sys, qchat.core.machine.memory, qchat.core.hub.catalog; print('mlx.core' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev")}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
