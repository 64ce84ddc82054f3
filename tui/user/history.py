"""The history of prompts across runs: one file of JSON strings, to which every running qchat appends.

Readable by its owner only. A file that cannot be read or written is ignored; the chat works without it.
"""

import contextlib
import json
import os
from pathlib import Path

from ...core.machine.files import write_whole

KEPT_ENTRIES = 1_000
KEPT_NBYTES = 2 << 20
MAX_ENTRY_NBYTES = 256 << 10


class History:
    """Prompts, oldest first, never two equal ones in a row; without a path they are not saved."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.entries: list[str] = []
        for text in self._read():
            self._remember(text)

    def add(self, text: str) -> None:
        """Add `text`, also to the file; blank text is ignored, and very long text is not saved."""
        if text.strip() and self._remember(text):
            self._append(text)

    def search(self, words: str) -> list[str]:
        """Return the entries that contain `words`, newest first, each once."""
        wanted = words.lower()
        return [text for text in dict.fromkeys(reversed(self.entries)) if wanted in text.lower()]

    def _remember(self, text: str) -> bool:
        if self.entries and self.entries[-1] == text:
            return False
        self.entries.append(text)
        return True

    def _read(self) -> list[str]:
        if self.path is None:
            return []
        try:
            with self.path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                size = file.tell()
                file.seek(max(0, size - KEPT_NBYTES))
                lines = file.read(KEPT_NBYTES).splitlines()
        except OSError:
            return []
        entries = [text for line in lines if (text := _entry(line))][-KEPT_ENTRIES:]
        if size > KEPT_NBYTES:
            self._shorten(entries)
        return entries

    def _shorten(self, entries: list[str]) -> None:
        """Rewrite the file with the newest `entries`, at half the size limit and in one step."""
        kept: list[bytes] = []
        for text in reversed(entries):
            kept.append(_line(text))
            if sum(map(len, kept)) > KEPT_NBYTES // 2:
                break
        if self.path is not None:
            with contextlib.suppress(OSError):
                write_whole(self.path, b"".join(reversed(kept)), mode=0o600)

    def _append(self, text: str) -> None:
        line = _line(text)
        if self.path is not None and len(line) <= MAX_ENTRY_NBYTES:
            with contextlib.suppress(OSError):
                _append(self.path, line)


def _entry(line: bytes) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return value if isinstance(value, str) else ""


def _line(text: str) -> bytes:
    return json.dumps(text).encode() + b"\n"


def _append(path: Path, line: bytes) -> None:
    """Append `line` in one call, so that lines of several processes do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)
