"""Writing to the screen or a pipe: text that others wrote reaches a terminal without its control characters.

Raises BrokenPipeError where the reader has gone, OutputError for any other failure to write.
"""

import sys
from typing import TextIO

from ...core.errors import QchatError
from .sanitise import printable


class OutputError(QchatError):
    """The disk is full, or the like."""


def write(stream: TextIO, text: str) -> None:
    """Write `text` now: as it is into a pipe or file, made printable for a terminal."""
    try:
        stream.write(printable(text) if stream.isatty() else text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output could not be written: {error.strerror}") from error


def note(sentence: str) -> None:
    """Tell the user something beside the output."""
    write(sys.stderr, f"qchat: {printable(sentence)}\n")
