"""Tries and times every form of every contest: `python -m qchat.core.ops.race RECORD DIMENSIONS [SECONDS]`.

Runs in a process of its own, because a GPU's driver may crash or hang on a kernel that is new to it. Each
form is compared with float32 first, then timed for some milliseconds. A form that does not return within
SECONDS ends the process; the next process skips it.
"""

import faulthandler
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..machine.backend import mx, on_gpu
from .agreement import relative_rms
from .candidates import Contest, Dimensions, Form, contests
from .verdicts import Record, Result, limit_of

TIMED_SECONDS, MOST_RUNS = 0.03, 7
FEWEST_RUNS = 3  # one alone may have been disturbed
NICENESS = 19
PATHS = re.compile(r"(?:~|\.{1,2})?(?:/[^\s/:;,'\"]+)+/?")


def run(found: Iterable[Contest], record: Record, limit_seconds: float | None = None) -> None:
    """Hold the contests whose results `record` lacks; with a limit, exit where a form does not return."""
    known = {result.key for result in record.results(racing=False)}
    for contest in found:
        wanted: Sequence[mx.array] | None = None
        for name, form in contest.forms.items():
            empty = Result(contest.operation, contest.shape, name, contest.limit)
            if empty.key in known:
                continue
            record.begin(empty)
            if limit_seconds is not None:
                faulthandler.dump_traceback_later(limit_of(name, limit_seconds), exit=True)
            try:
                wanted = _evaluated(contest.wanted) if wanted is None else wanted
                result = _tried(empty, form, wanted)
            finally:
                faulthandler.cancel_dump_traceback_later()
            record.add(result)
    record.end()


def _tried(empty: Result, form: Form, wanted: Sequence[mx.array]) -> Result:
    """Return the result of one form: its error, then its time or why it may not be used."""
    try:
        error = max(relative_rms(*pair) for pair in zip(_evaluated(form), wanted, strict=True))
        if not error <= empty.limit:  # NaN is bad, too
            return replace(empty, error=error, failure=f"it is off by {error:.1e}")
        return replace(empty, error=error, seconds=_seconds(form))
    except (RuntimeError, ValueError, TypeError) as problem:
        return replace(empty, failure=without_paths(" ".join(str(problem).split()))[:200])


def without_paths(text: str) -> str:
    """Return `text` fit to be shown to others: what looks like a path is cut out."""
    return PATHS.sub("...", text)


def _evaluated(form: Form) -> list[mx.array]:
    arrays = list(form())
    mx.eval(arrays)
    return arrays


def _seconds(form: Form) -> float:
    """Return the least time of a few runs."""
    begun, least = time.perf_counter(), float("inf")
    for number in range(1, MOST_RUNS + 1):
        start = time.perf_counter()
        _evaluated(form)
        end = time.perf_counter()
        least = min(least, end - start)
        if number >= FEWEST_RUNS and end - begun > TIMED_SECONDS:
            break
    return least


def main() -> None:
    """Hold the contests of the dimensions on the command line."""
    record = Record(Path(sys.argv[1]))
    dimensions = Dimensions.from_json(json.loads(sys.argv[2]))
    if not on_gpu():
        os.nice(NICENESS)  # on a CPU it is idle work
    with record.lock() as alone:
        if alone and not record.complete:
            run(contests(dimensions), record, float(sys.argv[3]))


if __name__ == "__main__":
    main()
