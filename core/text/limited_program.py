"""Answers requests within a budget of CPU time and memory: `python limited_program.py PROGRAM`.

PROGRAM is a Python file with a function `answer` from requests to replies. Requests are JSON
lines on stdin, each with its budget; one that exceeds it ends the process. `limited_process` runs this file.
Imports nothing of qchat, so that it starts fast.
"""

import json
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

EXCEEDED = 3  # exit status

Answer = Callable[[Mapping[str, Any]], dict[str, Any]]


def serve(answer: Answer) -> None:
    """Answer each line of stdin with one on stdout, until the process that writes them ends."""
    for line in sys.stdin.buffer:
        try:
            reply = json.dumps(_answer_within(json.loads(line), answer))
        except MemoryError:
            os._exit(EXCEEDED)
        sys.stdout.write(f"{reply}\n")
        sys.stdout.flush()


def _answer_within(request: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """Return the reply to one request. Raises MemoryError beyond the budget.

    Exceeding the time ends the process, even inside one long operation: that is the signal's default action.
    """
    _limit_memory(request["nbytes"])
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    try:
        return answer(request)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(nbytes: int) -> None:
    """Let allocations beyond `nbytes` fail. macOS has no such limit; there `limited_process` watches."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    serve(runpy.run_path(sys.argv[1])["answer"])
