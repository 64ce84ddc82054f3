"""Output to a terminal or a pipe; a terminal never receives control characters of untrusted text.

Raises BrokenPipeError if the reader is gone, OutputError for any other failure.
"""

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


def note(sentence: str) -> None:
    """Print a sentence to stderr."""
    write(sys.stderr, f"qchat: {printable(sentence)}\n")
