"""Output to a terminal or a pipe; a terminal never receives control characters of untrusted text.

Raises BrokenPipeError if the reader is gone, OutputError for any other failure.
"""

import os
import sys
from typing import TextIO

from ...core.errors import QchatError
from .sanitise import printable


class OutputError(QchatError):
    """Output failed, for example because the disk is full."""


def write(stream: TextIO, text: str) -> None:
    """Write and flush `text`: unchanged to a pipe or file, sanitised to a terminal."""
    try:
        stream.write(printable(text) if stream.isatty() else text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output could not be written: {error.strerror}") from error


def has_full_terminal() -> bool:
    """Tell whether this process has a terminal that can show a full screen."""
    if os.environ.get("TERM", "dumb") in ("", "dumb"):
        return False
    return sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()


def note(sentence: str) -> None:
    """Print a sentence to stderr."""
    write(sys.stderr, f"qchat: {printable(sentence)}\n")
