"""A child process that holds a contest with a planted form: `planted.py KIND RECORD DIMENSIONS SECONDS`."""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qchat.core.machine.backend import mx
from qchat.core.ops.candidates import Contest, Form
from qchat.core.ops.race import run
from qchat.core.ops.verdicts import Record

SIZE = 1 << 16


def right() -> Sequence[mx.array]:
    return [mx.ones(SIZE) * 2]


def wrong() -> Sequence[mx.array]:
    return [mx.ones(SIZE) * 2.1]


def no_number() -> Sequence[mx.array]:
    return [mx.full(SIZE, float("nan"))]


def raising() -> Sequence[mx.array]:
    raise RuntimeError("unable to build /home/somebody/library.metal\nat all")


def crash() -> Sequence[mx.array]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return right()


def hang() -> Sequence[mx.array]:
    """Sleep inside C, with the interpreter's lock held, as a driver may."""
    ctypes.PyDLL(None).sleep(1000)
    return right()


def deaf() -> Sequence[mx.array]:
    """Hang where the process no longer ends itself."""
    faulthandler.cancel_dump_traceback_later()
    return hang()


def slow() -> Sequence[mx.array]:
    time.sleep(0.05)
    return right()


FORMS: dict[str, Form] = {
    form.__name__: form for form in (right, wrong, no_number, raising, crash, hang, deaf, slow)
}


def main() -> None:
    kinds, path, dimensions, seconds = sys.argv[1:]
    json.loads(dimensions)
    record = Record(Path(path))
    usual, *others = kinds.split(",")
    forms = {"mlx": FORMS[usual], **{name: FORMS[name] for name in others if name != "ours"}}
    if others[-1:] == ["ours"]:  # the planted form under the name of our kernels
        forms = {"mlx": FORMS[usual], "ours": FORMS[others[0]]}
    with record.lock() as alone:
        if alone and not record.complete:
            run([Contest("planted", "shape", 1e-3, right, forms)], record, float(seconds))


if __name__ == "__main__":
    main()
