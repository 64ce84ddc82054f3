"""Memory pressure: readings from files as Linux writes them, and steps in order by scripted readings."""

import sys
from pathlib import Path

import pytest

from qchat.core.machine import pressure
from qchat.core.machine.pressure import CALM_SECONDS, SETTLE_SECONDS, PressureWatch, Reading, read_pressure
from tests.fake_clock import FakeClock

GIB = 1 << 30
CALM = Reading(free_nbytes=8 * GIB, total_nbytes=16 * GIB)
LOW = Reading(free_nbytes=GIB // 2, total_nbytes=16 * GIB)
BETWEEN = Reading(free_nbytes=GIB, total_nbytes=16 * GIB)  # neither low nor calm
STEPS = ("cache", "snapshots", "refuse", "end", "stop")


class PressureScript:
    """A watch over scripted readings; `taken` are its steps, and "over" when the pressure is."""

    def __init__(self) -> None:
        self.reading, self.clock, self.taken = CALM, FakeClock(), list[str]()
        steps = [lambda name=name: self.taken.append(name) for name in STEPS]
        self.watch = PressureWatch(
            steps, lambda _: self.taken.append("over"), lambda: self.reading, self.clock
        )

    def pass_seconds(self, seconds: float, reading: Reading) -> list[str]:
        """Check twice a second under this reading; returns the steps taken meanwhile."""
        self.reading, before = reading, len(self.taken)
        for _ in range(int(2 * seconds)):
            self.watch.check()
            self.clock.now += 0.5
        return self.taken[before:]


def test_each_step_is_taken_once_in_order_and_the_end_is_said_once():
    script = PressureScript()
    assert script.pass_seconds(60, CALM) == []
    assert script.pass_seconds(60, LOW) == list(STEPS)
    assert script.pass_seconds(60, CALM) == ["over"]


def test_a_step_has_time_to_help_before_the_next():
    script = PressureScript()
    assert script.pass_seconds(SETTLE_SECONDS, LOW) == ["cache"]
    assert script.pass_seconds(SETTLE_SECONDS, LOW) == ["snapshots"]
    assert script.pass_seconds(CALM_SECONDS + 1, CALM) == ["over"]
    assert script.pass_seconds(SETTLE_SECONDS, LOW) == ["cache"]  # of the next episode


def test_the_pressure_is_over_only_after_a_while_of_calm():
    script = PressureScript()
    script.pass_seconds(1, LOW)
    for reading in (CALM, BETWEEN, CALM, BETWEEN):
        assert script.pass_seconds(CALM_SECONDS - 1, reading) == []
    assert script.pass_seconds(SETTLE_SECONDS, LOW) == ["snapshots"]  # it goes on where it was
    assert script.pass_seconds(CALM_SECONDS + 1, CALM) == ["over"]


@pytest.mark.parametrize(
    ("reading", "low"),
    [
        (Reading(), False),  # nothing is known
        (CALM, False),
        (LOW, True),
        (BETWEEN, False),
        (Reading(free_nbytes=129 << 20, total_nbytes=GIB), False),
        (Reading(free_nbytes=127 << 20, total_nbytes=GIB), True),
        (Reading(free_nbytes=3 * GIB, total_nbytes=512 * GIB), False),
        (Reading(free_nbytes=2 * GIB, total_nbytes=16 * GIB, stalled_percent=30), True),
        (Reading(free_nbytes=12 * GIB, total_nbytes=16 * GIB, stalled_percent=90), False),  # others stall
        (Reading(mac_level=1), False),
        (Reading(mac_level=2), True),
        (Reading(mac_level=4), True),
    ],
)
def test_what_counts_as_low(reading: Reading, low: bool):
    assert reading.is_low == low
    assert not (reading.is_low and reading.is_calm)


def test_swapping_is_pressure_and_what_was_in_swap_before_is_none():
    script = PressureScript()
    in_swap = Reading(free_nbytes=8 * GIB, total_nbytes=16 * GIB, swapped_nbytes=6 * GIB)
    assert script.pass_seconds(60, in_swap) == []
    script = PressureScript()
    assert script.pass_seconds(1, CALM) == []
    more = Reading(free_nbytes=8 * GIB, total_nbytes=16 * GIB, swapped_nbytes=pressure.SWAP_NBYTES + 1)
    assert script.pass_seconds(5, more) == ["cache"]
    even_more = Reading(free_nbytes=8 * GIB, total_nbytes=16 * GIB, swapped_nbytes=3 * pressure.SWAP_NBYTES)
    assert script.pass_seconds(5, even_more) == ["snapshots"]
    assert script.pass_seconds(CALM_SECONDS + 1, even_more) == ["over"]  # it stays in swap


@pytest.mark.skipif(sys.platform != "linux", reason="these files are Linux's")
def test_linux_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pressure, "host_available_nbytes", lambda: 123)
    files = {
        "proc/meminfo": "MemTotal: 9 kB\nSwapTotal:  4096 kB\nSwapFree:  1024 kB\n",
        "proc/pressure/memory": "some avg10=12.50 avg60=0 avg300=0 total=1\nfull avg10=3.00 avg60=0\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": "5\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_pressure(tmp_path) == Reading(123, GIB, 3 << 20, 12.5)


def test_a_system_that_tells_nothing_is_not_low(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pressure, "host_available_nbytes", lambda: 0)
    reading = read_pressure(tmp_path)
    assert not reading.is_low and reading.is_calm
    assert reading.total_nbytes > 0


def test_a_mac_is_asked_for_its_level_and_its_swap(monkeypatch: pytest.MonkeyPatch):
    class Library:
        def __init__(self, _: object) -> None:
            """Stand in for the C library."""

        def sysctlbyname(self, name: bytes, value: pressure.ctypes.Array, *_: object) -> int:
            if name == b"vm.swapusage":  # total, available, used; page size, encrypted
                value.raw = b"".join(n.to_bytes(8, "little") for n in (9, 4, 5, 1 << 14))
            else:
                value.raw = (2).to_bytes(4, "little")
            return 0

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(pressure.ctypes, "CDLL", Library)
    reading = read_pressure()
    assert (reading.swapped_nbytes, reading.mac_level, reading.is_low) == (5, 2, True)
