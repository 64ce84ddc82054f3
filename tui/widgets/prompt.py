"""The prompt: one to ten rows with history, reverse search, completion, and folded pastes.

It knows nothing about models: candidates, hints and queued messages come from callables.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from ..text.output import printable
from ..user.attachments import pasted_picture
from ..user.history import History
from ..user.keymap import Keymap
from ..user.pastes import Pastes
from .completion import Candidate, Completion

PLACEHOLDER = "Ask something. / lists commands, @ attaches a file"
ANSWERING = "Answering: enter queues a message"
SEARCHING = "Search earlier prompts"
TYPING_SECONDS = 2.0  # after the last key in which the user may still be typing


@dataclass(frozen=True)
class Sources:
    """The sources of a prompt.

    `candidates` completes the text before the cursor, `hint` the whole text; `recall` takes back a queued
    message.
    """

    candidates: Callable[[str], Sequence[Candidate]]
    hint: Callable[[str], str]
    recall: Callable[[], str | None]


class Prompt(TextArea):
    """Posts Submitted with the text, pastes expanded, and Asked for actions of the screen."""

    @dataclass
    class Submitted(Message):
        text: str

    @dataclass
    class Asked(Message):
        """The screen is to do `action`, an action id of the keymap."""

        action: str

    @dataclass
    class Folded(Message):
        """A long `text` was pasted, which a marker stands for."""

        text: str

    @dataclass
    class ModeChanged(Message):
        """The list above was opened or closed, or the search began or ended."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+underscore", "undo", "Undo", show=False),
    ]

    def __init__(self, keymap: Keymap, history: History, popup: Completion, sources: Sources):
        super().__init__(
            id="prompt",
            compact=True,
            soft_wrap=True,
            show_line_numbers=False,
            highlight_cursor_line=False,
            placeholder=PLACEHOLDER,
        )
        self.cursor_blink = False
        self.match_cursor_bracket = False
        self.pastes = Pastes()
        self.searching = False
        self.busy = False
        self.held = False
        self.answering = False
        self._keymap, self._prompts, self._popup, self._sources = keymap, history, popup, sources
        self._place: int | None = None
        self._draft = self._recalled = ""
        self._quiet = False
        self._typed_at = -TYPING_SECONDS

    # --- requests of the screen ---

    def show_placeholder(self) -> None:
        """Say what typing does now."""
        self.placeholder = SEARCHING if self.searching else ANSWERING if self.answering else PLACEHOLDER

    @property
    def is_in_use(self) -> bool:
        """Whether it holds a text, or the user types and only has not begun the next one yet."""
        return bool(self.text) or time.monotonic() < self._typed_at + TYPING_SECONDS

    @property
    def full_text(self) -> str:
        """The text that would be sent."""
        return self.pastes.expand(self.text)

    def put(self, text: str) -> None:
        """Replace the text, with the cursor at its end and no list above."""
        self._quiet = True
        self.text = self.pastes.recall(printable(text))
        self.move_cursor(self.document.end)
        self.suggestion = ""
        self._quiet = False
        self._show_candidates(())

    def remember(self, text: str) -> None:
        """Add `text` to the history."""
        self._prompts.add(text)

    def keep_draft(self) -> None:
        """Add a text that was not sent to the history."""
        self.remember(self.full_text)

    def clear_draft(self) -> None:
        """Move the text into the history, or leave a search."""
        if self.escape():
            return
        self.keep_draft()
        self._reset()

    def escape(self) -> bool:
        """Close the list or the search; return whether there was one."""
        if self.searching:
            self._end_search(self._draft)
        elif self._popup.open:
            self._show_candidates(())
        else:
            return False
        return True

    # --- keys ---

    async def _on_key(self, event: events.Key) -> None:
        action = self._keymap.action("prompt", event.key)
        if action is not None and self._heard(action):
            event.stop()
            event.prevent_default()
        elif event.key == "enter":  # Textual's editor would begin a new line
            event.prevent_default()

    def _heard(self, action: str) -> bool:
        """Do `action`; return False to leave the key to the editor."""
        match action:
            case "send":
                self._enter()
            case "newline":
                self.insert("\n")
            case "complete":
                self._tab()
            case "history.previous":
                return self._earlier()
            case "history.next":
                return self._later()
            case "history.search":
                self._search()
            case "keys" if self.text:
                return False
            case _:
                self.post_message(self.Asked(action))
        return True

    def _enter(self) -> None:
        row, column = self.cursor_location
        if self._popup.open and self._takes_candidate():
            if self._accept():
                self.submit()
        elif column and self.document.get_line(row)[column - 1] == "\\":
            self.replace("\n", (row, column - 1), (row, column))
        else:
            self.submit()

    def _takes_candidate(self) -> bool:
        """Whether enter takes the candidate: the user moved to it, or typed a command's first letters.

        A space ends the name: what enter runs then is the line, not an argument that nobody chose.
        """
        typed = self.text
        if self.searching or self._popup.moved:
            return True
        named = [candidate.text.rstrip() for candidate in self._popup.candidates]
        return typed.startswith("/") and not any(char.isspace() for char in typed) and typed not in named

    def _tab(self) -> None:
        if self._popup.open:
            self._accept()
        elif self.busy and self.text.strip():
            self.submit()

    def submit(self) -> None:
        """Send the text; if it is empty or `held`, as commands never are, ask the screen what to do."""
        text = self.full_text
        if not text.strip() or (self.held and not text.startswith("/")):
            self.post_message(self.Asked("send"))
            return
        self._prompts.add(text)
        self._reset()
        self.post_message(self.Submitted(text))

    def _reset(self) -> None:
        self._place, self._recalled = None, ""
        self.put("")
        self.pastes.clear()
        self.history.clear()

    # --- candidates ---

    def update_suggestion(self) -> None:
        """Complete and hint after every edit."""
        if self._quiet:
            return
        self._typed_at = time.monotonic()
        if self.searching:
            self._show_candidates([Candidate(text, text) for text in self._prompts.search(self.text)])
            return
        row, column = self.cursor_location
        before = self.document.get_line(row)[:column]
        self._show_candidates(self._sources.candidates(before) if row == 0 or "@" in before else ())
        at_end = self.cursor_location == self.document.end
        self.suggestion = self._sources.hint(self.text) if at_end and self.text else ""

    def _show_candidates(self, candidates: Sequence[Candidate]) -> None:
        if candidates or self._popup.open:
            self._popup.show(candidates)
            self.post_message(self.ModeChanged())

    def _accept(self) -> bool:
        """Insert the chosen candidate; return whether the line is ready to be sent."""
        candidate = self._popup.chosen
        if candidate is None:
            return False
        if self.searching:
            self._end_search(candidate.text)
            return False
        row, column = self.cursor_location
        self.replace(candidate.text, (row, candidate.start), (row, column))
        if not candidate.text.endswith((" ", "/")):
            self._show_candidates(())
        return candidate.ready

    def action_cursor_right(self, select: bool = False) -> None:
        """Move right without accepting a hint, which is no text."""
        hint, self.suggestion = self.suggestion, ""
        super().action_cursor_right(select)
        self.suggestion = hint

    # --- earlier prompts ---

    def _earlier(self) -> bool:
        if self._popup.open:
            self._popup.move(-1)
            return True
        if not (self._is_recalled() or self.navigator.is_first_wrapped_line(self.cursor_location)):
            return False
        if self._place is None and not self.text and (queued := self._sources.recall()) is not None:
            self.put(queued)
            return True
        place = len(self._prompts.entries) if self._place is None else self._place
        if place > 0:
            if self._place is None:
                self._draft = self.full_text
            self._recall(place - 1)
        return True

    def _later(self) -> bool:
        if self._popup.open:
            self._popup.move(1)
            return True
        if self._place is None or not (
            self._is_recalled() or self.navigator.is_last_wrapped_line(self.cursor_location)
        ):
            return False
        self._recall(self._place + 1)
        return True

    def _is_recalled(self) -> bool:
        return self._place is not None and self.text == self._recalled

    def _recall(self, place: int) -> None:
        """Show entry `place` of the history; after the last one comes the draft."""
        entries = self._prompts.entries
        inside = place < len(entries)
        self.put(entries[place] if inside else self._draft)
        self._place, self._recalled = (place if inside else None), self.text

    def _search(self) -> None:
        if self.searching:
            self._popup.move(1)
            return
        self._draft, self.searching = self.full_text, True
        self.show_placeholder()
        self.post_message(self.ModeChanged())
        self.update_suggestion()

    def _end_search(self, text: str) -> None:
        self.searching = False
        self.show_placeholder()
        self.put(text)
        self.post_message(self.ModeChanged())

    # --- changes of the editor's own behaviour ---

    async def _on_paste(self, event: events.Paste) -> None:
        event.prevent_default()
        event.stop()
        text = printable(event.text.replace("\r\n", "\n").replace("\r", "\n"))
        picture = pasted_picture(text, Path.cwd())
        folded = self.pastes.fold(text)
        self.insert(f"{picture} " if picture else folded)
        if not picture and folded != text:
            self.post_message(self.Folded(text))

    def action_delete_left(self) -> None:
        """Delete a folded paste as a whole."""
        row, column = self.cursor_location
        marker = self.pastes.marker_before(self.document.get_line(row)[:column])
        if marker and self.selection.is_empty:
            self.delete((row, column - len(marker)), (row, column))
        else:
            super().action_delete_left()

    def action_cursor_line_end(self, select: bool = False) -> None:
        """Go to the end of the line, or, at the end of the text, to the end of the conversation."""
        if self.cursor_location == self.document.end and not select:
            self.post_message(self.Asked("follow"))
        super().action_cursor_line_end(select)
