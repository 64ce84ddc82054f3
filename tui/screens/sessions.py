"""Earlier conversations: the list, the last lines of the one under the cursor, what can be done with it."""

import asyncio
import tempfile
from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from ...core.errors import QchatError, UsageError
from ..commands.sessions import slug
from ..tasks.sessions import row
from ..text.sanitise import printable, wrap
from ..user.paths import user_path
from .listing import UNDO_SECONDS, Ask, Column, Keys, Listing, Row, heading, one_line

if TYPE_CHECKING:
    from ...core import Store
    from ...core.storage.records import Conversation, Node
    from ..chat.controller import Chat
    from ..commands import Front

LISTED = 500
SEARCH_SECONDS = 0.12  # typing on stops a search that has not begun
WIDE = 80  # columns from which there is room for two panes
LAST_MESSAGES, LAST_LINES, LONGEST_LINE = 8, 12, 400


class SessionsScreen(Listing):
    """Dismissed with "/open NUMBER"."""

    HEADING = "Conversations"
    EMPTY = "No conversation yet. Ask something, and it is kept here."
    NOT_FOUND = "No conversation has all these words. Try fewer of them; esc lists all conversations."
    HINT = "/ searches everything said"
    COLUMNS = (
        Column("", 1),
        Column("title"),
        Column("questions", 9, "right", rank=2),
        Column("changed", 10, "right"),
        Column("model", 18, rank=1),
    )
    KEYS: ClassVar[Keys] = (
        ("enter", "open"),
        ("/", "search"),
        ("r", "rename"),
        ("d", "delete"),
        ("f", "fork"),
        ("e", "export"),
        ("esc", "close"),
    )
    FILTER_KEYS: ClassVar[Keys] = (("enter", "open the first"), ("↓", "list"), ("esc", "all"))
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "rename", show=False),
        Binding("d", "delete", show=False),
        Binding("u", "undo", show=False),
        Binding("f", "fork", show=False),
        Binding("e", "export", show=False),
    ]

    def __init__(self, store: "Store", here: int | None = None):
        super().__init__()
        self._store, self._here = store, here
        self._deleted: int | None = None
        self._days: dict[str, str] = {}  # the part of the list that each number belongs to

    def detail(self) -> ComposeResult:
        with VerticalScroll(id="sheet-detail", can_focus=False):
            yield Static(id="sheet-preview")

    def on_mount(self) -> None:
        super().on_mount()
        self.read()

    def resized(self) -> None:
        self.query_one("#sheet-detail").display = self.size.width >= WIDE

    def empty(self) -> str:
        return self.NOT_FOUND if self.filter.value else self.EMPTY

    def matching(self, text: str) -> list[Row]:
        """Return all rows, because the store has searched already: under their days if all are listed."""
        if text:
            return self.rows
        days = groupby(self.rows, key=lambda row: self._days.get(row.id, ""))
        return [row for day, rows in days for row in (heading(day), *rows)]

    def filter_changed(self, _text: str) -> None:
        self.read(SEARCH_SECONDS)

    @work(exclusive=True, group="read")
    async def read(self, seconds: float = 0.0) -> None:
        """List what holds the words that are in the search field."""
        await asyncio.sleep(seconds)
        try:
            found = await asyncio.to_thread(self._store.conversations, LISTED, self.filter.value)
            models = await asyncio.to_thread(self._store.model_names)
            counts = await asyncio.to_thread(self._store.question_counts)
        except QchatError as error:
            self.say(str(error), "error")
            return
        if self.is_open:
            self._days = {str(one.id): day_of(one.updated) for one in found}
            self.show_rows([self._row(one, models.get(one.id, ()), counts.get(one.id, 0)) for one in found])

    def _row(self, one: "Conversation", models: Sequence[str], questions: int) -> Row:
        mark = "●" if one.id == self._here else ""
        _, number, changed, model, title = row(one, models, here=self._here)
        return Row(number, (mark, title, f"{questions:,}", changed, model))

    def highlighted(self, row: Row | None) -> None:
        self.preview(int(row.id) if row else None)

    @work(exclusive=True, group="preview")
    async def preview(self, number: int | None) -> None:
        try:
            branch = await asyncio.to_thread(self._store.branch, number) if number is not None else []
        except QchatError as error:
            self.say(str(error), "error")
            return
        if self.is_open:
            preview = self.query_one("#sheet-preview", Static)
            words = self.filter.value.casefold().split()
            preview.update(last_lines(branch, max(preview.size.width, 20), words))
            detail = self.query_one("#sheet-detail", VerticalScroll)
            detail.scroll_home(animate=False) if words else detail.scroll_end(animate=False)

    def chosen(self, row: Row) -> None:
        self.dismiss(None if int(row.id) == self._here else f"/open {row.id}")

    # --- keys ---

    def action_rename(self) -> None:
        if self.current is not None:
            number, title = int(self.current.id), self.current.cells[1]
            self._ask("Title", title, lambda text: self._store.rename(number, text))

    def action_export(self) -> None:
        if self.current is not None:
            number, name = int(self.current.id), f"{slug(self.current.cells[1])}.md"
            self._ask("File (.md, .html or .json)", name, lambda text: self._export(number, text))

    def _ask(self, question: str, text: str, act: Any) -> None:
        def answered(given: str | None) -> None:
            if given:
                self._try(act, given)

        self.app.push_screen(Ask(question, text), answered)

    def _try(self, act: Any, *given: Any) -> None:
        """Do something to the store, then list it anew."""
        try:
            act(*given)
        except QchatError as error:
            self.say(str(error), "error")
        self.read()

    def _export(self, number: int, name: str) -> None:
        from ...core import export_conversation

        path = user_path(name)
        export_conversation(self._store, number, path)
        self.say(f"written to {path}")

    def action_delete(self) -> None:
        if self.current is not None:
            self._try(self._delete, self.current)

    def _delete(self, row: Row) -> None:
        if int(row.id) == self._here:
            raise UsageError("this is the conversation you are in: begin another one first")
        self._store.delete(int(row.id))
        self._deleted = int(row.id)
        self.say(f"deleted: {one_line(row.cells[1], 40)} · u brings it back", seconds=UNDO_SECONDS)

    def action_undo(self) -> None:
        if self._deleted is not None:
            self._try(self._store.restore, self._deleted)
            self._deleted = None

    def action_fork(self) -> None:
        if self.current is not None:
            self._try(self._fork, int(self.current.id))

    def _fork(self, number: int) -> None:
        """Go on with a copy, so that the conversation itself stays as it is."""
        self.dismiss(f"/open {copied(self._store, number)}")


def copied(store: "Store", number: int) -> int:
    """A new conversation with all that the other holds. Raises StoreError."""
    from ...core import export_conversation, import_conversation

    with tempfile.TemporaryDirectory(prefix="qchat-") as folder:
        path = Path(folder) / "copy.json"
        export_conversation(store, number, path)
        copy = import_conversation(store, path)
    store.rename(copy, f"{store.conversation(number).title} (fork)")
    return copy


def day_of(seconds: float, now: datetime | None = None) -> str:
    """Return the part of a list that a conversation of this time belongs to."""
    days = ((now or datetime.now()).date() - datetime.fromtimestamp(seconds).date()).days
    return "Today" if days <= 0 else "Yesterday" if days == 1 else "This week" if days < 7 else "Earlier"


def last_lines(branch: "list[Node]", width: int = 80, words: Sequence[str] = ()) -> Content:
    """Return the last lines of the last messages, or those messages and lines that have one of `words`."""
    parts: list[Content] = []
    nodes = [node for node in branch if _first_hit(node.text.splitlines(), words) is not None] or branch
    for node in nodes[-LAST_MESSAGES:]:
        asked = node.role == "user"
        lines = [cut_line(line) for line in node.text.strip().splitlines()]
        hit = _first_hit(lines, words)
        begin = max(hit - 1, 0) if hit is not None else 0 if asked else max(len(lines) - LAST_LINES, 0)
        shown = lines[begin : begin + LAST_LINES]
        rows = [row for line in shown for row in wrap(line, max(width - 2, 1))]
        text = "\n".join(f"▌ {row}" if asked else row for row in rows)
        if node.state == "cancelled":
            text += " (stopped)"
        parts.append(Content.styled(text, "bold $user-bar" if asked else "$foreground"))
    return Content("\n\n").join(parts) if parts else Content.styled("nothing was said yet", "$text-muted")


def _first_hit(lines: Sequence[str], words: Sequence[str]) -> int | None:
    """Return the first of `lines` that has one of `words`."""
    folded = [line.casefold() for line in lines]
    return next((place for place, line in enumerate(folded) if any(word in line for word in words)), None)


def cut_line(line: str) -> str:
    return printable(line[:LONGEST_LINE]).expandtabs(4)


def make(chat: "Chat", front: "Front") -> SessionsScreen:
    """Raises UsageError where conversations are not kept."""
    del front
    if chat.store is None:
        raise UsageError("conversations are not kept in this run")
    return SessionsScreen(chat.store, chat.state.conversation)
