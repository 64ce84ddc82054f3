"""What the compute device can do: its bandwidth, its memory, and what is free of it."""

import pytest

from qchat.core.machine import device
from qchat.core.machine.backend import mx
from qchat.core.machine.device import copy_bandwidth, device_free_nbytes, device_limit_nbytes


def test_a_copy_moves_as_much_as_memory_can():
    """Between a slow disk and a fast cache; the same figure when asked for again."""
    assert 1e8 < copy_bandwidth() < 1e14
    assert copy_bandwidth() is copy_bandwidth()
    assert device_limit_nbytes() > 1 << 28


@pytest.mark.parametrize(("active", "free"), [(3000, 5000), (9000, 1)])
def test_a_gpu_has_free_what_is_not_active_and_a_full_one_is_not_an_unknown_one(
    monkeypatch: pytest.MonkeyPatch, active: int, free: int
):
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 8000})
    monkeypatch.setattr(mx, "get_active_memory", lambda: active)
    assert device_free_nbytes() == free


def test_a_cpu_has_free_what_the_system_can_give(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    for nbytes in (7000, 0):
        monkeypatch.setattr(device, "host_available_nbytes", lambda nbytes=nbytes: nbytes)
        assert device_free_nbytes() == nbytes
