"""Clipboard support that reports whether the copy worked, and takes the clipboard's picture.

The system's clipboard program comes first, because some terminals silently drop the escape sequence (OSC 52).
Over ssh such a program would reach the wrong machine, so there the sequence is used.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ...core.errors import UsageError
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
    return _first_installed(commands)


def _first_installed(commands: Sequence[list[str]]) -> list[str] | None:
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


PNG = b"\x89PNG\r\n\x1a\n"
# AppleScript, which every Mac has: the picture as hexadecimal digits between guillemets
OSASCRIPT = ["osascript", "-e", "the clipboard as \u00abclass PNGf\u00bb"]
NO_PICTURE = "the clipboard holds no picture"


def picture(folder: Path) -> Path:
    """Write the clipboard's picture into a new file in `folder` and return it.

    Raises UsageError without a picture, and where no program here reads the clipboard.
    """
    command = _picture_program()
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_SECONDS * 5, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{command[0]} did not tell what the clipboard holds") from error
    data = _from_applescript(done.stdout) if command == OSASCRIPT else done.stdout
    if done.returncode or not data.startswith(PNG):
        raise UsageError(NO_PICTURE)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = (path.stem.removeprefix("picture-") for path in folder.glob("picture-*.png"))
    number = max((int(one) for one in numbers if one.isdecimal()), default=0) + 1
    path = folder / f"picture-{number}.png"
    path.write_bytes(data)
    return path


def _picture_program() -> list[str]:
    """Return the command that writes the clipboard's picture to stdout. Raises UsageError."""
    if sys.platform == "darwin":
        commands, names = [["pngpaste", "-"], OSASCRIPT], "pngpaste or osascript"
    else:
        commands = [["wl-paste", "--type", "image/png"]] if os.environ.get("WAYLAND_DISPLAY") else []
        if os.environ.get("DISPLAY"):
            commands.append(["xclip", "-selection", "clipboard", "-target", "image/png", "-out"])
        names = "wl-paste or xclip, and a desktop"
    found = _first_installed(commands)
    if found is None:
        raise UsageError(f"no program here reads pictures from the clipboard (wanted {names})")
    return found


def _from_applescript(text: bytes) -> bytes:
    """Return the bytes of `\u00abdata PNGf89504E47...\u00bb`; none for anything else."""
    digits = text.partition(b"PNGf")[2].strip().removesuffix("\u00bb".encode())
    try:
        return bytes.fromhex(digits.decode("ascii", "replace"))
    except ValueError:
        return b""
