"""The window around the terminal: its title, the progress in the taskbar, notifications when nobody looks.

Writes only what changed. Whoever owns the terminal passes `write`, and calls `close` in every case.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..user.sequences import (
    BUSY_PROGRESS,
    FAILED_PROGRESS,
    NO_PROGRESS,
    RESTORE_TITLE,
    SAVE_TITLE,
    Notices,
    kind_of_notices,
    knows_progress,
    notification,
    progress,
    title,
)

if TYPE_CHECKING:
    from .controller import Chat

# a reply or a job that took less needs no notification
LONG_SECONDS = 10.0
NAME = "qchat"
MARKS = {"thinking": "…", "answering": "…", "reading": "…", "loading": "…", "dead": "✖"}


class Window:
    """The window of one chat. `window_title` and `notify` of the settings switch its parts off."""

    def __init__(self, write: Callable[[str], None], env: Mapping[str, str] | None = None):
        env = os.environ if env is None else env
        self._write, self._has_progress = write, knows_progress(env)
        self._kind: Notices = kind_of_notices(env)
        self._title = self._progress = ""
        self._saved = self._paused = False

    def show(self, chat: "Chat") -> None:
        """Show what the chat is about and how far it is."""
        if self._paused:
            return
        if not chat.settings["window_title"]:
            self._clear()
            return
        if not self._saved:
            self._saved = True
            self._write(SAVE_TITLE)
        if (wanted := title(window_title(chat))) != self._title:
            self._title = wanted
            self._write(wanted)
        self._show_progress(progress_of(chat) if self._has_progress else "")

    def _show_progress(self, wanted: str) -> None:
        if wanted != self._progress:
            self._write(wanted or NO_PROGRESS)
            self._progress = wanted

    def notify(self, chat: "Chat", text: str, seconds: float) -> None:
        """Notify the user, who looks elsewhere, of the end of something that took `seconds`."""
        if chat.settings["notify"] and seconds >= LONG_SECONDS and not self._paused:
            self._write(notification(text, self._kind))

    def pause(self) -> None:
        """Lend the terminal to another program: write nothing until `resume`."""
        self._clear()
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def close(self, write: Callable[[str], None] | None = None) -> None:
        """Give the title back and show no progress, with `write` if given; more than once does nothing."""
        self._write = write or self._write
        self._clear()
        self._paused = True

    def _clear(self) -> None:
        self._show_progress("")
        if self._saved:
            self._write(title("") + RESTORE_TITLE)
        self._saved, self._title = False, ""


def window_title(chat: "Chat") -> str:
    """Return what the chat is about, else its model, with a mark for what it does."""
    mark = MARKS.get(chat.status.phase, "…" if chat.running_jobs else "")
    about = chat.state.title or (chat.model.name if chat.model else "")
    return " ".join(part for part in (mark, f"{about} · {NAME}" if about else NAME) if part)


def progress_of(chat: "Chat") -> str:
    """Return the sequence for how far the chat is; empty where it rests."""
    status = chat.status
    match status.phase:
        case "loading" | "reading" if status.total:
            return progress(status.done / status.total)
        case "starting" | "loading" | "reading" | "thinking" | "answering":
            return BUSY_PROGRESS
        case "dead":
            return FAILED_PROGRESS
    job = next(iter(chat.running_jobs), None)
    return "" if job is None else BUSY_PROGRESS if job.share is None else progress(job.share)
