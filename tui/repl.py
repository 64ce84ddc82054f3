"""The line-based chat: a prompt, a streamed reply, a few commands; append-only, so scrollback keeps it all.

Ctrl-C stops a reply or clears the line; ctrl-D, /bye, exit and quit leave. Thoughts go to stderr if wanted.
"""

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory

from ..core import Session, load_session
from ..core.errors import QchatError, UsageError
from ..core.events import Done, Event
from .oneshot import Request, TextView, note, stats_line, stopped_by_interrupt
from .output import write

FAREWELLS = ("/bye", "/exit", "/quit", "exit", "quit")


def run(model: str, settings: Mapping[str, Any], *, show_thinking: bool, stats: bool) -> int:
    """Chat until the user leaves; returns the exit code. Raises QchatError where no model can be loaded."""
    chat = Chat(load_session(model, **settings), Request(model, "", show_thinking=show_thinking, stats=stats))
    chat.greet()
    prompts: PromptSession[str] = PromptSession(history=InMemoryHistory())
    while True:
        try:
            line = prompts.prompt("❯ ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0
        if line in FAREWELLS:
            return 0
        if line:
            chat.answer(line)


class Chat:
    """One session and what a line that the user typed does with it."""

    def __init__(self, session: Session, request: Request):
        self.session, self.request = session, request
        self.commands: dict[str, Callable[[str], Generator[Event] | None]] = {
            "/help": self._help,
            "/retry": self._retry,
            "/edit": self._edit,
            "/undo": self._undo,
            "/new": self._new,
            "/cache": self._cache,
        }

    def greet(self) -> None:
        note(f"{self.session.engine.name}; /help lists the commands, ctrl-D leaves")

    def answer(self, line: str) -> None:
        """Say `line`, or do what it commands; whatever is wrong with it becomes one sentence."""
        try:
            events = self._command(line) if line.startswith("/") else self.session.stream(line)
            if events is not None:
                self._show(events)
        except QchatError as error:
            note(str(error))

    def _show(self, events: Generator[Event]) -> None:
        view, done = TextView(self.request), None
        with stopped_by_interrupt(self.session), closing(events):
            for event in events:
                view(event)
                done = event if isinstance(event, Done) else done
        if done is not None and done.detail:
            note(done.detail)
        if done is not None and self.request.stats:
            note(stats_line(done))

    def _command(self, line: str) -> Generator[Event] | None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise UsageError(f"there is no command {name}: {', '.join((*self.commands, '/bye'))}")
        return self.commands[name](rest.strip())

    def _help(self, _: str) -> None:
        """/help: this list."""
        lines = [command.__doc__ or "" for command in self.commands.values()]
        write(sys.stdout, "\n".join([*lines, "/bye: leave."]) + "\n")

    def _retry(self, _: str) -> Generator[Event]:
        """/retry: answer the last question again."""
        return self.session.retry()

    def _edit(self, rest: str) -> Generator[Event]:
        """/edit N TEXT: ask TEXT in place of question N, on a branch of its own."""
        number, _, text = rest.partition(" ")
        if not number.isdecimal() or not text.strip():
            raise UsageError("say which question and what to ask instead: /edit N TEXT")
        return self.session.edit(int(number), text.strip())

    def _undo(self, _: str) -> None:
        """/undo: take the last question and its reply back."""
        note(f"taken back: {self.session.undo()}")

    def _new(self, _: str) -> None:
        """/new: begin a new conversation."""
        self.session.reset()

    def _cache(self, _: str) -> None:
        """/cache: what each turn read again, and why."""
        told = self.session.explain()
        for turn in told["turns"]:
            counts = f"{turn['cached_tokens']:,} kept, {turn['prefilled_tokens']:,} read"
            write(sys.stdout, f"turn {turn['turn']}: {counts} ({turn['how']}: {turn['why']})\n")
        held, allowed = told["snapshot_nbytes"] / 2**20, told["snapshot_budget_nbytes"] / 2**20
        write(sys.stdout, f"{len(told['snapshots'])} kept states, {held:,.0f} of {allowed:,.0f} MiB\n")
