"""Writing to the screen or a pipe: text that others wrote reaches a terminal without its control characters.

Raises BrokenPipeError where the reader has gone, OutputError for any other failure to write.
"""

import re
from typing import TextIO

from ..core.errors import QchatError

# escape sequences; C0 but tab and newline, DEL and C1; what overrides the direction of reading
_UNPRINTABLE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u202a-\u202e\u2066-\u2069]"
)


class OutputError(QchatError):
    """The disk is full, or the like."""


def printable(text: str) -> str:
    """`text` without anything that could move the cursor, recolour, or address the terminal itself."""
    return _UNPRINTABLE.sub("", text)


def write(stream: TextIO, text: str) -> None:
    """Write `text` now: as it is into a pipe or file, made printable for a terminal."""
    try:
        stream.write(printable(text) if stream.isatty() else text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output could not be written: {error.strerror}") from error
