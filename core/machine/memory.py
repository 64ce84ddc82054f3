"""How much memory this machine has, read from the system alone: listing models must not import MLX.

`device` builds on this what MLX has to be asked for.
"""

import ctypes
import os
import struct
import sys
from pathlib import Path

from .limits import limited_room

GIB = 1 << 30


def host_total_nbytes() -> int:
    """Bytes of memory that the machine is built with."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def host_available_nbytes() -> int:
    """Bytes that Linux estimates it can still give this process without swapping; 0 on other systems.

    Limits of a container and of `ulimit -v` count; at least 1 where the system tells, as 0 means unknown.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    room = limited_room()
    return free if not free or room is None else max(1, min(free, room))


def model_limit_nbytes() -> int:
    """Bytes that a model may take: on a Mac what Metal recommends, elsewhere nine tenths of the memory.

    Metal recommends two thirds of the memory up to 36 GiB and three quarters of more.
    """
    total = host_total_nbytes()
    if sys.platform != "darwin":
        return total * 9 // 10
    return total * 2 // 3 if total <= 36 * GIB else total * 3 // 4


def resident_nbytes(pid: int) -> int:
    """Bytes of memory that the process `pid` occupies; 0 where the system does not tell."""
    if sys.platform == "darwin":
        usage = ctypes.create_string_buffer(1024)
        failed = ctypes.CDLL(None).proc_pid_rusage(pid, 0, usage)  # rusage_info_v0, of 96 bytes
        return 0 if failed else struct.unpack_from("=16x8Q", usage)[7]  # ri_phys_footprint
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
