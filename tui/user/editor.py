"""Text edited in the user's own editor, through a file that only they can read."""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from shutil import which

from ...core.errors import UsageError

FALLBACKS = ("nano", "vi")
MAX_NBYTES = 4 << 20


def edit(text: str, env: Mapping[str, str] | None = None) -> str | None:
    """Return `text` as the user left it, None if the editor failed. Blocks; the editor needs the terminal.

    Raises UsageError where no editor can be started or it left no text.
    """
    with tempfile.TemporaryDirectory(prefix="qchat-") as folder:
        path = Path(folder) / "prompt.md"
        path.write_text(text, encoding="utf-8")
        return _read(path) if open_file(path, env) == 0 else None


def open_file(path: Path, env: Mapping[str, str] | None = None) -> int:
    """Open a file in the user's editor; returns its exit code once it has ended. Raises UsageError."""
    command = startable_editor(env)
    try:
        return subprocess.run([*command, str(path)], check=False).returncode
    except OSError as error:
        raise UsageError(f"the editor {command[0]} cannot be started: {error.strerror}") from error


def startable_editor(env: Mapping[str, str] | None = None) -> list[str]:
    """Return the editor's command. Raises UsageError if there is none, or its program is not found."""
    command = editor(os.environ if env is None else env)
    if which(command[0]) is None:
        raise UsageError(f"the editor {command[0]} cannot be started: there is no such program")
    return command


def editor(env: Mapping[str, str]) -> list[str]:
    """Return the command in $VISUAL or $EDITOR, or of an editor that most systems have. Raises UsageError."""

    for variable in ("VISUAL", "EDITOR"):
        if env.get(variable, "").strip():
            try:
                command = shlex.split(env[variable])
            except ValueError as error:
                raise UsageError(f"${variable} is not a command: {error}") from error
            if not command:
                raise UsageError(f"${variable} is not a command: it is empty")
            return command
    found = next((name for name in FALLBACKS if which(name)), None)
    if found is None:
        raise UsageError("there is no editor: set $EDITOR to one")
    return [found]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
        if len(data) > MAX_NBYTES:
            raise UsageError(f"the editor left more than {MAX_NBYTES >> 20} MiB")
        return data.decode().rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"what the editor left cannot be read: {error}") from error
