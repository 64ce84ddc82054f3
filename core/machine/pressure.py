"""Memory pressure: what the system says of it, and steps against it, one after another while it lasts.

Linux tells free memory, limits of control groups, and stalls (PSI); macOS its pressure level; both tell swap.
Knows what to read and when to act, not what the steps do.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .limits import ROOT, limit_nbytes
from .memory import host_available_nbytes, host_total_nbytes

CHECK_SECONDS = 0.5
SETTLE_SECONDS = 2.0  # for a step to have an effect before the next one
CALM_SECONDS = 10.0  # without pressure, before it counts as over
FREE_SHARE = 0.05  # of the memory, which should stay free
LEAST_FREE_NBYTES, MOST_FREE_NBYTES = 128 << 20, 2 << 30
CALM_FACTOR = 1.5  # times that much free is calm
STALLED_PERCENT, CALM_PERCENT = 20.0, 5.0
STALLED_FACTOR = 4  # with more than that many times as much free, stalls have another reason
SWAP_NBYTES = 256 << 20  # more in swap than when all was calm
MAC_WARNING = 2  # 1 is normal, 4 is critical


@dataclass(frozen=True)
class Reading:
    """What the system says now: bytes free of all (0: unknown), bytes in swap, and how it fares.

    `stalled_percent` is the share of the last ten seconds in which some program waited for memory,
    `mac_level` the level of macOS; both are 0 where the system tells no such thing.
    """

    free_nbytes: int = 0
    total_nbytes: int = 0
    swapped_nbytes: int = 0
    stalled_percent: float = 0.0
    mac_level: int = 0

    @property
    def wanted_nbytes(self) -> int:
        """Bytes that should stay free."""
        return max(LEAST_FREE_NBYTES, min(MOST_FREE_NBYTES, int(FREE_SHARE * self.total_nbytes)))

    @property
    def is_low(self) -> bool:
        few = 0 < self.free_nbytes < self.wanted_nbytes
        stalls = self.stalled_percent >= STALLED_PERCENT
        stalls = stalls and self.free_nbytes < STALLED_FACTOR * self.wanted_nbytes
        return few or stalls or self.mac_level >= MAC_WARNING

    @property
    def is_calm(self) -> bool:
        enough = not self.free_nbytes or self.free_nbytes >= CALM_FACTOR * self.wanted_nbytes
        return enough and self.stalled_percent < CALM_PERCENT and self.mac_level < MAC_WARNING


def read_pressure(root: Path = ROOT) -> Reading:
    """Ask the system. What it does not tell is 0."""
    if sys.platform == "darwin":
        return Reading(
            total_nbytes=host_total_nbytes(),
            swapped_nbytes=_sysctl("vm.swapusage", 32, 16, 8),
            mac_level=_sysctl("kern.memorystatus_vm_pressure_level", 4, 0, 4),
        )
    swap = _fields(root / "proc/meminfo", ":")
    return Reading(
        free_nbytes=host_available_nbytes(),
        total_nbytes=min(host_total_nbytes(), limit_nbytes(root) or host_total_nbytes()),
        swapped_nbytes=int(1024 * (swap.get("SwapTotal", 0) - swap.get("SwapFree", 0))),
        stalled_percent=_fields(root / "proc/pressure/memory", "=").get("some avg10", 0.0),
    )


def _fields(path: Path, mark: str) -> dict[str, float]:
    """The first number after each name of lines such as `SwapFree: 5 kB` and `some avg10=0.00`."""
    fields: dict[str, float] = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(mark)
            with suppress(ValueError, IndexError):
                fields[name] = float(rest.split()[0])
    return fields


def _sysctl(name: str, size: int, begin: int, nbytes: int) -> int:
    """A number of `nbytes` at `begin` of a value of `size` bytes; 0 where the system has none."""
    value, length = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
    try:
        failed = ctypes.CDLL(None).sysctlbyname(name.encode(), value, ctypes.byref(length), None, 0)
    except AttributeError:
        return 0
    return 0 if failed else int.from_bytes(value.raw[begin : begin + nbytes], "little")


class PressureWatch:
    """Takes one of `steps` after another while memory is low, each once until it has been calm for a while.

    Each step frees memory and takes no time; all run on the thread that calls `check`. `relieved` runs once
    when the pressure is over, with the number of steps that were taken.
    """

    def __init__(
        self,
        steps: Sequence[Callable[[], None]],
        relieved: Callable[[int], None],
        read: Callable[[], Reading] = read_pressure,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._steps, self._relieved, self._read, self._clock = steps, relieved, read, clock
        self._taken = 0
        self._next = self._calm_since = 0.0
        self._swapped: int | None = None  # bytes in swap when all was calm

    def check(self) -> None:
        """Read once; take the next step, or notice that the pressure is over."""
        reading, now = self._read(), self._clock()
        if self._swapped is None:
            self._swapped = reading.swapped_nbytes
        swaps = reading.swapped_nbytes > self._swapped + SWAP_NBYTES
        if reading.is_low or swaps:
            self._calm_since = now
            if self._taken < len(self._steps) and (not self._taken or now >= self._next):
                self._next = now + SETTLE_SECONDS
                self._taken += 1
                self._steps[self._taken - 1]()
            if swaps:
                self._swapped = reading.swapped_nbytes  # more of it is the next reason
        elif not reading.is_calm:
            self._calm_since = now
        elif now - self._calm_since >= CALM_SECONDS:
            self._swapped = reading.swapped_nbytes
            self._end()

    def _end(self) -> None:
        taken, self._taken = self._taken, 0
        if taken:
            self._relieved(taken)
