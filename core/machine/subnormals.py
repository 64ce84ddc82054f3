"""Flushes subnormal floats to zero, in processes that ask for it.

On Intel CPUs each operation on a subnormal number takes a microcode trap: up to four fifths of prefill.
Linux threads inherit the setting from the thread that starts them, so it has to be made before the threads of
MLX and of the BLAS exist. `flush_process` therefore belongs at the start of a process that qchat owns: the
engine process and a one-shot run. A program that imports `qchat.core` keeps its subnormals, in numpy, in MLX
and everywhere else, unless it sets QCHAT_SUBNORMALS=flush or calls `flush_process` before its first array.

QCHAT_SUBNORMALS is `auto`, `flush` or `keep`; `keep` also overrides `flush_process`.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError

# By machine: the offset in glibc's fenv_t of the 32-bit control register, and its flush bits.
# x86-64: MXCSR, flush to zero (bit 15) and denormals are zero (bit 6); aarch64: FPCR, FZ (bit 24).
REGISTERS = {"x86_64": (28, 0x8040), "aarch64": (0, 1 << 24)}
FENV_NBYTES = 64  # glibc's is 32 bytes on x86-64 and 8 on aarch64


def flush_process() -> bool:
    """Flush subnormals to zero on this thread and on all threads it starts from now on.

    Returns whether they are flushed: False with QCHAT_SUBNORMALS=keep and on machines without a known switch.
    Raises UsageError for a bad variable.
    """
    if policy() != "keep":
        _change(set_bits=True)
    return flushes()


@contextmanager
def flushing() -> Iterator[None]:
    """Do what `flush_process` does, then restore this thread; threads started meanwhile still flush."""
    before = flushes()
    flush_process()
    try:
        yield
    finally:
        if not before:
            _change(set_bits=False)


def flush_on_request() -> None:
    """Call `flush_process` if QCHAT_SUBNORMALS is `flush`. Raises UsageError for a bad variable."""
    if policy() == "flush":
        _change(set_bits=True)


def policy() -> str:
    """The value of QCHAT_SUBNORMALS. Raises UsageError for an unknown one."""
    value = os.environ.get("QCHAT_SUBNORMALS", "auto")
    if value not in ("auto", "flush", "keep"):
        raise UsageError(f"QCHAT_SUBNORMALS is {value!r}, wanted auto, flush, keep")
    return value


def flushes() -> bool:
    """Whether this thread flushes subnormals to zero."""
    smallest_normal = sys.float_info.min
    return smallest_normal * 0.5 == 0.0


def _change(*, set_bits: bool) -> None:
    register = REGISTERS.get(platform.machine())
    if register is None or sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    offset, bits = register
    libm = ctypes.CDLL("libm.so.6")
    environment = (ctypes.c_ubyte * FENV_NBYTES)()
    if libm.fegetenv(environment):
        return
    control = ctypes.c_uint32.from_buffer(environment, offset)
    control.value = control.value | bits if set_bits else control.value & ~bits
    libm.fesetenv(environment)
