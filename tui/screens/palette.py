"""The command palette: commands, models, conversations, themes and settings in one list, one line each.

Typing filters; what begins with the words comes first, then what holds them in its name, then in its line.
"""

import asyncio
import shlex
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.binding import Binding, BindingType

from ...core.errors import QchatError
from ...core.hub.library import Locations, model_names
from ..commands import COMMANDS
from ..commands.base import Command
from ..commands.parameters import format_value
from ..commands.view import theme_names
from ..user.keymap import ACTIONS, Keymap
from ..user.settings import KEYS as SETTINGS
from .listing import Column, Keys, Listing, Row

if TYPE_CHECKING:
    from ..chat.controller import Chat
    from ..commands import Front

LISTED = 200  # conversations
PLACES = {"model": "/load", "conversation": "/open", "theme": "/theme", "setting": "/set"}


class PaletteScreen(Listing):
    """Dismissed with the line to run; a line that needs an argument is begun in the prompt."""

    HEADING = "Do anything"
    HINT = "type to filter"
    EMPTY = "Nothing has all these words. Try fewer letters, or ? for all keys and commands."
    AUTO_FOCUS = "#sheet-filter"
    COLUMNS = (Column("what it does"), Column("command", 18, rank=2), Column("key", 10, "right", rank=1))
    FILTER_KEYS: ClassVar[Keys] = (("enter", "do it"), ("↑↓", "choose"), ("esc", "close"))
    KEYS: ClassVar[Keys] = FILTER_KEYS
    BINDINGS: ClassVar[list[BindingType]] = [Binding("up", "up", show=False)]

    def __init__(self, chat: "Chat", front: "Front", keymap: Keymap):
        super().__init__()
        self._chat, self._front = chat, front
        self.rows = [*command_rows(keymap), *named_rows(chat)]

    def on_mount(self) -> None:
        super().on_mount()
        self.show_rows()
        self.read()

    @work(exclusive=True)
    async def read(self) -> None:
        """Add what has to be read from the disk."""
        try:
            more = await asyncio.to_thread(stored_rows, self._chat)
        except QchatError as error:
            self.say(str(error), "error")
            return
        if self.is_open:
            self.show_rows([*self.rows, *more])

    def matching(self, text: str) -> list[Row]:
        """Put first what begins with the text, then what has it in its name."""
        found = super().matching(text)
        return sorted(found, key=lambda row: _distance(row, text.strip().casefold()))

    def chosen(self, row: Row) -> None:
        if row.id.endswith(" "):
            self._front.put_prompt(row.id)
            self.dismiss(None)
        else:
            self.dismiss(row.id)

    def action_to_list(self) -> None:
        self.options.action_cursor_down()

    def action_up(self) -> None:
        self.options.action_cursor_up()

    def action_leave(self) -> None:
        self.dismiss(None)


def _distance(row: Row, text: str) -> int:
    name = row.cells[1].removeprefix("/").casefold()
    what = row.cells[0].casefold()
    what = what.partition(": ")[2] or what
    return 0 if name.startswith(text) else 1 if text in name else 2 if what.startswith(text) else 3


def command_rows(keymap: Keymap) -> list[Row]:
    """Return a row for each command."""
    keys = {action.id: keymap.shown(action.id) for action in ACTIONS if action.scope != "transcript"}
    return [
        Row(_line(one), (_sentence(one), f"/{one.name}", keys.get(one.key or "", ""))) for one in COMMANDS
    ]


def _line(command: Command) -> str:
    """Return the command's line, with a blank at its end where an argument has to follow."""
    needs = command.usage and not command.usage.startswith("[")
    return f"/{command.name} " if needs else f"/{command.name}"


def _sentence(command: Command) -> str:
    """Return the first clause of the command's help."""
    return command.help.split("; ", 1)[0].rstrip(".")


def named_rows(chat: "Chat") -> list[Row]:
    """Return the themes, and the settings with their values."""
    themes = [_named("theme", name, f"/theme {name}") for name in theme_names()]
    values = [
        _named("setting", f"{name} = {_value(chat.settings[name])}", f"/set {name} ") for name in SETTINGS
    ]
    return [*themes, *values]


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else format_value(value)


def stored_rows(chat: "Chat") -> list[Row]:
    """Return the models and the conversations on the disk. Raises QchatError."""
    places = Locations.from_setting(chat.settings["models_dir"])
    models = [_named("model", name, f"/load {shlex.quote(name)}") for name in model_names(places)]
    kept = chat.store.conversations(LISTED) if chat.store else ()
    return [*models, *(_named("conversation", one.title or "untitled", f"/open {one.id}") for one in kept)]


def _named(kind: str, name: str, line: str) -> Row:
    return Row(line, (f"{kind.capitalize()}: {name}", PLACES[kind], ""))


def make(chat: "Chat", front: "Front") -> PaletteScreen:
    return PaletteScreen(chat, front, getattr(front, "keymap", None) or Keymap())
