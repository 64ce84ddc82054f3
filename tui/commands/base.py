"""What a slash command is, what it may ask of a front end, and how its arguments are read.

A command's docstring is its help: the first line stands in tables, the rest on its own page. Every argument
is typed and checked; an invalid one becomes a sentence that says what would be valid.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal, Protocol

from ...core.conversation.summary import Turn
from ...core.errors import UsageError
from ...core.worker.wire import ModelInfo
from ..chat.controller import View
from ..chat.start import Goal
from ..chat.turns import last_model
from ..text.report import Lines, Report

if TYPE_CHECKING:
    from ..chat.controller import Chat

Screen = Literal[
    "models",
    "sessions",
    "rewind",
    "help",
    "stats",
    "theme",
    "keys",
    "serve",
    "probs",
    "palette",
    "convert",
]
SWITCH = {
    "on": True,
    "yes": True,
    "true": True,
    "1": True,
    "off": False,
    "no": False,
    "false": False,
    "0": False,
}


class Front(View, Protocol):
    """What a command may ask of a front end besides showing things."""

    async def confirm(self, question: str) -> bool: ...
    async def choose(self, title: str, options: list[tuple[str, str]]) -> str | None:
        """Return the value of one of `options` (value, label); None if the user cancels."""
        ...

    @property
    def can_edit(self) -> bool:
        """Whether there is a prompt that text can be put into."""
        ...

    def put_prompt(self, text: str) -> None: ...
    async def edit_text(self, text: str) -> str | None:
        """Return `text` as changed in the user's editor; None if nothing was saved."""
        ...

    def copy(self, text: str) -> str:
        """Copy `text`; return a sentence that says how."""
        ...

    def find(self, text: str) -> int: ...
    def screen(self, name: Screen) -> bool:
        """Open a screen; return False if this front end has none, so that the command shows a report."""
        ...

    def set_theme(self, name: str) -> None: ...
    def show_thinking(self, shown: bool) -> None: ...
    def show_pictures(self, how: str) -> None: ...
    def show_panes(self, names: Sequence[str]) -> bool:
        """Show these panes and no others; return False if this front end has none."""
        ...

    def mouse(self, on: bool) -> None: ...
    async def leave(self, to: Goal) -> None: ...


class Command:
    """One slash command. `names[0]` is the one that help shows; `key` the action id of its key, if any.

    `while_busy`: it runs at once while a reply is being written; the others wait for their turn. `confirms`:
    what it says only confirms a choice, and need not stay in the conversation.
    """

    names: tuple[str, ...] = ()
    key: str | None = None
    usage: str = ""
    while_busy: bool = False
    confirms: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def help(self) -> str:
        """Return the docstring's first line."""
        return (self.__doc__ or "").strip().split("\n", 1)[0]

    def page(self) -> Report:
        """Return the command's help page."""
        paragraphs = (self.__doc__ or "").strip().split("\n\n")
        lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
        others = ", ".join(f"/{name}" for name in self.names[1:])
        also = [f"Also: {others}"] if others else []
        works = "Works while a reply is being written."
        usable = [works if self.while_busy else "While a reply is being written, it waits for its turn."]
        return Report(f"/{self.name} {self.usage}".strip(), (Lines([*lines, *also, *usable]),))

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        """Return whole arguments that may complete `argument`."""
        del chat, argument
        return []

    def runs_at_once(self, argument: str) -> bool:
        """Whether it can run with this argument while a reply is being written."""
        del argument
        return self.while_busy

    async def settle(self, chat: "Chat", front: Front, argument: str) -> str | None:
        """Check the argument of a command that is about to wait, and ask now for what is missing.

        Return the argument that it shall run with, None if the user cancels. Raises QchatError.
        """
        del chat, front
        return argument

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        raise NotImplementedError

    def wrong(self, sentence: str) -> UsageError:
        """Return an error that ends with the command's usage."""
        return UsageError(f"{sentence}: /{self.name} {self.usage}".rstrip(": "))


# --- arguments ---


def whole(text: str, what: str, low: int, high: int | None = None) -> int:
    """Read a whole number. Raises UsageError that names the range."""
    limit = f"a whole number from {low:,}" + ("" if high is None else f" to {high:,}")
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"{what} is {text!r:.40}, wanted {limit}") from None
    if value < low or (high is not None and value > high):
        raise UsageError(f"{what} is {value:,}, wanted {limit}")
    return value


def number(text: str, what: str, low: float, high: float) -> float:
    """Read a number. Raises UsageError that names the range."""
    limit = f"a number from {low:g} to {high:g}"
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{what} is {text!r:.40}, wanted {limit}") from None
    if not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{what} is {text}, wanted {limit}")
    return value


def switch(text: str, what: str) -> bool:
    """Read on or off, in any of its spellings. Raises UsageError."""
    value = SWITCH.get(text.lower())
    if value is None:
        raise UsageError(f"{what} is {text!r:.40}, wanted on or off")
    return value


def choice(text: str, what: str, known: Sequence[str]) -> str:
    """Read one of `known`. Raises UsageError that names the nearest of them."""
    if text.lower() in known:
        return text.lower()
    raise UsageError(f"{what} is {text!r:.40}, wanted {nearest(text, known)}")


def nearest(text: str, known: Sequence[str]) -> str:
    """List what `text` may have meant, the nearest of `known` first, for a sentence."""
    near = get_close_matches(text.lower(), known, 1)
    return f"{near[0]} perhaps, or one of {', '.join(known)}" if near else f"one of {', '.join(known)}"


def starting(argument: str, known: Sequence[str]) -> list[str]:
    """Return those of `known` that begin with what was typed."""
    return [one for one in known if one.lower().startswith(argument.lower())]


# --- turns ---


def turns(chat: "Chat") -> Sequence[Turn]:
    """Return the turns of the current branch; none before a model is loaded."""
    return chat.state.turns


def turn_number(chat: "Chat", text: str) -> int:
    """Read the number of a question. Raises UsageError that says how many there are."""
    return number_among(turns(chat), text)


def number_among(among: Sequence[Turn], text: str) -> int:
    """Read the number of one of the turns `among`. Raises UsageError that says how many there are."""
    count = len(among)
    if not count:
        raise UsageError("there is no question yet")
    word = text.removeprefix("#")
    if word.isdecimal() and not 1 <= int(word[:9]) <= count:
        raise UsageError(f"there is no question {word:.9}: this conversation has {count:,}")
    return whole(text.removeprefix("#"), "the question", 1, count)


def turn_or_last(chat: "Chat", text: str) -> int:
    """Read the number of a question, of the last one if `text` is empty. Raises as `turn_number` does."""
    return turn_number(chat, text or str(len(turns(chat)) or 1))


def complete_turn(chat: "Chat", argument: str) -> list[str]:
    return starting(argument, [str(turn.number) for turn in reversed(turns(chat))])


def note_other_model(chat: "Chat", front: Front) -> None:
    """Tell which model the conversation was last held with, if another one is loaded now."""
    last, here = last_model(chat.state.turns), chat.model.name if chat.model else ""
    if last and here and last != here:
        front.note(f"this conversation was last held with {last}; {here} answers now")


def need_model(chat: "Chat") -> ModelInfo:
    """Return the loaded model. Raises UsageError if there is none."""
    if chat.model is None:
        raise UsageError("no model is loaded: /load NAME, /models lists what there is")
    return chat.model


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: 1 turn, 2 turns."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_words(text: str, characters: int = 60) -> str:
    """Return the beginning of `text` as one line."""
    line = " ".join(text.split())
    return line if len(line) <= characters else f"{line[: characters - 1]}…"
