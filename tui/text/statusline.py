"""A status line on stderr that replaces itself, on a terminal only."""

import sys
import time

from .output import printable
from .sanitise import cells

LINES_PER_SECOND = 10


class StatusLine:
    """Shows nothing if stderr is not a terminal; drops updates that come too fast."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._last, self._width = 0.0, 0  # the width in cells

    def show(self, line: str) -> None:
        now = time.monotonic()
        if self._shown and now - self._last > 1 / LINES_PER_SECOND:
            self._last = now
            self._replace(printable(line))

    def clear(self) -> None:
        """Clear the line for the next output."""
        if self._width:
            self._replace("")

    def _replace(self, line: str) -> None:
        # straight to the terminal: carriage returns are ours here
        sys.stderr.write("\r" + " " * self._width + "\r" + line)
        sys.stderr.flush()
        self._width = cells(line)
