"""Clipboard support that reports whether the copy worked.

The system's clipboard program comes first, because some terminals silently drop the escape sequence (OSC 52).
Over ssh such a program would reach the wrong machine, so there the sequence is used.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

from .sequences import clipboard

PATIENCE_SECONDS = 2.0
# terminals cut or drop longer sequences
MAX_OSC52_NBYTES = 74_994


def copy(text: str, osc52: Callable[[str], None] | None = None) -> str:
    """Copy `text`; `osc52` writes to the terminal, if there is one. Returns a sentence for the user."""
    size = _size(text)
    remote = bool(os.environ.get("SSH_CONNECTION") or os.environ.get("SSH_TTY"))
    if not remote and (program := _program()) is not None:
        return f"copied {size}" if _run(program, text) else f"not copied: {program[0]} refused the text"
    sequence = clipboard(text)
    if osc52 is None:
        return "not copied: there is no clipboard program here (pbcopy, wl-copy, xclip or xsel)"
    if len(sequence) > MAX_OSC52_NBYTES:
        return f"not copied: {size} are too many for the terminal's clipboard sequence; /export writes a file"
    osc52(sequence)
    return f"sent {size} to the terminal's clipboard (OSC 52), which it may ignore"


def _program() -> list[str] | None:
    """Return the command that copies to this desktop's clipboard, or None."""
    if sys.platform == "darwin":
        commands = [["pbcopy"]]
    else:
        commands = [["wl-copy"]] if os.environ.get("WAYLAND_DISPLAY") else []
        if os.environ.get("DISPLAY"):
            commands += [["xclip", "-selection", "clipboard"], ["xsel", "--clipboard", "--input"]]
    return next((command for command in commands if shutil.which(command[0])), None)


def _run(command: list[str], text: str) -> bool:
    """Run a clipboard program and return whether it succeeded.

    Its output is not read: a process that it leaves behind to serve the clipboard would keep a pipe open.
    """
    try:
        done = subprocess.run(
            command,
            input=text.encode(errors="replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _size(text: str) -> str:
    lines = text.count("\n") + 1
    return f"{lines:,} lines" if lines > 1 else f"{len(text):,} characters"
