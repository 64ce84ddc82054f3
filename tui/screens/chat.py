"""The main screen: the conversation, the status of the engine, the prompt, and the keys of the moment.

Keys arrive as action ids of the keymap; every line, typed or chosen, goes through `run_line`.
"""

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.screen import Screen
from textual.widgets import Input, Static

from ...core.conversation.summary import Turn
from ...core.errors import QchatError, UsageError
from ..chat.client import EngineDied
from ..chat.controller import Chat, View
from ..chat.meter import Status as Facts
from ..chat.start import Beginning
from ..chat.turns import last_question
from ..chat.window import Window
from ..commands import confirms, hint, parse, perform
from ..commands.base import plural
from ..commands.thinking import describe_thinking, set_budget, set_thinking
from ..commands.tools import ask_about_project
from ..commands.view import toggle_panes
from ..text.figures import format_tokens
from ..text.markdown import whole_tables
from ..user.attachments import attach, pictures
from ..user.history import History
from ..user.keymap import ACTIONS, Keymap
from ..user.pastes import line_count
from ..user.sequences import find_graphics
from ..user.settings import Settings
from ..widgets.completion import Completion
from ..widgets.findbar import OPEN_SECONDS, FindBar
from ..widgets.header import Header
from ..widgets.keybar import Keybar
from ..widgets.panes.panes import Panel
from ..widgets.prompt import Prompt, Sources
from ..widgets.queued import Queued
from ..widgets.status import Status
from ..widgets.transcript.blocks import CHARACTERS_PER_TOKEN
from ..widgets.transcript.gallery import Gallery
from ..widgets.transcript.messages import (
    CopyRequested,
    EditRequested,
    FindRequested,
    ForkRequested,
    MenuRequested,
    RetryRequested,
    SiblingRequested,
    TablesRequested,
)
from ..widgets.transcript.transcript import Transcript
from .front import ARMED_SECONDS, AppFront, describe_chat
from .greeting import Greeter
from .lines import candidates, describe_missing
from .panes import ScreenPanes, opened
from .table import TableScreen
from .useful_keys import BUSY, REPLYING, useful_keys

TWICE_SECONDS = 1.0
BUDGET = "1024"
LEAST_CONTEXT = 1_024
NARROW, LEAST_WIDTH, LEAST_HEIGHT = 70, 40, 10
TOO_SMALL = "This window is too small: make it 40 columns by 10 rows, or leave with ctrl+q and use --plain."


class ChatScreen(Screen[None]):
    """The main screen of the chat that `make_chat` returns; without a `beginning` that one only goes on."""

    AUTO_FOCUS = "#prompt"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            ",".join(action.keys),
            f"do('{action.id}')",
            action.label,
            show=False,
            priority=True,
            id=action.id,
        )
        for action in ACTIONS
        if action.scope == "chat"
    ]

    def __init__(
        self,
        make_chat: Callable[[View], Chat],
        *,
        settings: Settings,
        keymap: Keymap,
        history: History,
        beginning: Beginning | None = None,
    ):
        super().__init__()
        self.keymap = keymap
        self.front = AppFront(self, keymap)
        gallery = Gallery(self.front.to_terminal, self._read_picture)
        self.transcript = Transcript(settings["measure"], gallery=gallery)
        self.status_row, self.header, self.keybar, self.queued = Status(), Header(), Keybar(), Queued()
        self.find_bar, self.completion = FindBar(), Completion()
        sources = Sources(lambda before: candidates(before, self.chat), hint, self._take_queued)
        self.prompt = Prompt(keymap, history, self.completion, sources)
        self.panes = ScreenPanes(lambda: self.chat, self.go, lambda: self.prompt.focus())
        self.window = Window(self.front.to_terminal)
        self.status_row.beside = self.panes.in_sight
        self.chat = make_chat(self.front)
        self._greeter = Greeter(self.chat, keymap, self.transcript)
        self._beginning = beginning
        self._phase = ""
        self.typed: dict[str, str] = {}  # the lines as typed, by messages with attached files
        self._armed = self._escaped = -ARMED_SECONDS
        self._doing: dict[str, Callable[[], Any]] = {
            "stop": self._escape,
            "interrupt": self._interrupt,
            "leave": self._leave,
            "transcript": self._to_transcript,
            "thoughts": self._toggle_thoughts,
            "thinking": self._cycle_thinking,
            "wrap_up": self._wrap_up,
            "palette": lambda: self.front.screen("palette"),
            "help": lambda: self.front.screen("help"),
            "models": lambda: self.front.screen("models"),
            "sessions": lambda: self.front.screen("sessions"),
            "panes": self._toggle_panes,
            "live_bench": lambda: self.run_line("/bench live"),
            "new": lambda: self.run_line("/new"),
            "find": self._open_find,
            "scroll_up": lambda: self.transcript.scroll_page_up(animate=False),
            "scroll_down": lambda: self.transcript.scroll_page_down(animate=False),
            "top": lambda: self.transcript.scroll_home(animate=False),
            "follow": self.transcript.go_to_end,
            "redraw": self._redraw,
            "suspend": lambda: self.app.action_suspend_process(),
            "quit": self._leave,
            "editor": lambda: self.go(self._edit_prompt()),
            "keys": lambda: self.front.screen("keys"),
            "send": self._restart,
        }

    def compose(self) -> ComposeResult:
        yield self.header
        with Horizontal(id="middle"):
            yield self.transcript
            yield self.panes.panel
        yield self.find_bar
        yield self.completion
        yield self.queued
        yield self.panes.strip
        yield self.status_row
        with Horizontal(id="prompt-row"):
            yield Static("❯", id="mark")
            yield self.prompt
        yield self.keybar
        yield Static(TOO_SMALL, id="too-small")

    def on_mount(self) -> None:
        self.front.show_thinking(self.chat.settings["show_thinking"])
        self.show_pictures(self.chat.settings["pictures"])
        self.show_status(self.chat.status)
        self.panes.show(opened(self.chat))
        self.call_after_refresh(lambda: self.go(self._greeter.read()))  # after the first paint
        if self._beginning is not None:
            self.go(self._begin(self._beginning))
        else:
            self.chat.take_over()

    async def _begin(self, beginning: Beginning) -> None:
        self.chat.show_stats = self.chat.show_stats or beginning.stats
        if beginning.said:
            self.front.note(beginning.said, "warning")
        self.go(self.chat.load(beginning.model, conversation=beginning.conversation))
        await ask_about_project(self.chat, self.front)
        if beginning.text:
            await self._perform(beginning.text)

    def on_resize(self, event: events.Resize) -> None:
        width, height = event.size
        self.set_class(width < NARROW, "-narrow")
        self.set_class(width < LEAST_WIDTH or height < LEAST_HEIGHT, "-tiny")
        self.set_class(height < 20, "-low")
        self.panes.place(event.size)

    # --- display ---

    def show_status(self, status: Facts) -> None:
        self.window.show(self.chat)
        describe_chat(self.status_row, self.chat)
        self.status_row.show(status)
        self.panes.moved()
        self.queued.show(self.chat.queue)
        if status.phase != self._phase:
            self._phase = status.phase
            self.prompt.busy = status.phase in BUSY
            self.prompt.held = status.phase == "dead"
            self.prompt.answering = status.phase in REPLYING
            self.prompt.show_placeholder()
            self.show_facts()

    @property
    def running_app(self) -> App[Any]:
        return self.app

    def show_facts(self) -> None:
        self.header.show(self.chat.model, self.chat.state)
        self._greeter.show()
        self.show_keys()

    def show_keys(self) -> None:
        """Show the few keys that make sense now."""
        place = "panel" if self.focused is self.panes.panel else "prompt"
        place = "transcript" if self.focused is self.transcript else place
        place = "completion" if self.completion.open else place
        names = useful_keys(self.chat, "search" if self.prompt.searching else place, self._half_context())
        self.keybar.show([(self.keymap.shown(name), label) for name, label in names])

    def show_pictures(self, how: str) -> None:
        """Show pictures as the setting says and this terminal can; without colours only name them."""
        self.go(self._show_pictures(how))

    async def _show_pictures(self, how: str) -> None:
        graphics = await asyncio.to_thread(find_graphics, how, self.app.console.color_system, os.environ)
        self.transcript.draw_pictures(graphics, shown=how != "off" and not self.app.no_color)

    def _read_picture(self, digest: str) -> bytes | None:
        return self.chat.picture_files.read(digest, self.chat.state.conversation)

    # --- lines ---

    @on(Prompt.Submitted)
    def _submitted(self, event: Prompt.Submitted) -> None:
        self.run_line(event.text)

    def run_line(self, line: str) -> None:
        """Run the command in `line`, or send it as a message."""
        self.run_worker(self._run(line))

    async def _run(self, line: str) -> None:
        """Run a line; what a command says is scrolled into sight, and what it changed is shown."""
        notes, turns = self.transcript.notes, len(self.chat.state.turns)
        self.front.confirming = confirms(line)
        try:
            await self._shown(self._perform(line))
        finally:
            self.front.confirming = False
        if line.startswith("/"):
            self.show_facts()
            if self.transcript.notes > notes and len(self.chat.state.turns) == turns:
                self.transcript.go_to_end()

    def run_chosen(self, line: str | None) -> None:
        """Run the line that another screen was dismissed with; a question to change comes to the prompt."""
        word, _, number = (line or "").partition(" ")
        if word == "/edit" and number.isdecimal():
            self._edit_question(EditRequested(int(number)))
        elif line:
            self.run_line(line)

    def put_prompt(self, text: str) -> None:
        self.prompt.put(text)
        self.prompt.focus()

    async def _perform(self, line: str) -> None:
        try:
            if isinstance(parse(line), str):
                typed, line = line, attach(line, Path.cwd())
                self.typed[line], self.chat.pictures[line] = typed, pictures(typed, Path.cwd())
                if absent := describe_missing(typed):
                    self.keybar.say(absent, "warning")
        except UsageError:
            self.front.returned(line)
            raise
        await perform(line, self.chat, self.front)

    def go(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` beside the screen, and show its errors."""
        self.run_worker(self._shown(work))

    async def _shown(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await work
        except EngineDied:
            self.show_facts()  # the chat has told of it
        except QchatError as error:
            self.front.note(str(error), "error")
        except OSError as error:
            self.front.note(f"{error.filename or 'that'}: {error.strerror or error}", "error")

    def _take_queued(self) -> str | None:
        queued = self.chat.waiting.take_back()
        self.queued.show(self.chat.queue)
        return None if queued is None else self.typed.get(queued, queued)

    async def _edit_prompt(self) -> None:
        text = await self.front.edit_text(self.prompt.full_text)
        if text is not None:
            self.put_prompt(text)

    # --- keys ---

    @on(Prompt.Asked)
    def _asked(self, event: Prompt.Asked) -> None:
        self.action_do(event.action)

    @on(Prompt.Folded)
    def _folded(self, event: Prompt.Folded) -> None:
        tokens = format_tokens(len(event.text) / CHARACTERS_PER_TOKEN)
        self.keybar.say(f"pasted {plural(line_count(event.text), 'line')} · about {tokens} tokens")

    @on(Prompt.ModeChanged)
    def _mode_changed(self) -> None:
        below = self.size.height - self.status_row.region.y
        self.completion.styles.margin = (0, 0, below, 2)
        self.query_one("#mark", Static).update("⌕" if self.prompt.searching else "❯")
        self.show_keys()

    def on_descendant_focus(self) -> None:
        self.show_keys()

    def on_key(self, event: events.Key) -> None:
        """Pass letters to the prompt that the focused conversation has no key for."""
        if event.key in self.active_bindings:
            return
        if self.focused in (self.transcript, self.panes.panel) and event.is_printable and event.character:
            event.stop()
            self.prompt.focus()
            self.prompt.insert(event.character)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave some keys to the focused widget while their action makes no sense."""
        match action, parameters:
            case "do", ("leave",):
                return self.focused is self.prompt and not self.prompt.text
            case "do", ("wrap_up",):
                return self._phase == "thinking" or (self._phase == "dead" and self._half_context() > 0)
            case "do", ("top" | "follow" | "scroll_up" | "scroll_down",):
                return not isinstance(self.focused, Input)
        return True

    def action_do(self, action: str) -> None:
        self._doing[action]()

    def _redraw(self) -> None:
        self.transcript.gallery.resume()
        self.app.refresh(repaint=True, layout=True)

    def _restart(self) -> None:
        """Restart a dead engine; enter with nothing to send does so."""
        if self._phase == "dead":
            self.go(self.chat.restart())

    def _wrap_up(self) -> None:
        """End the thought, or restart a dead engine, perhaps one short of memory, with half the context."""
        if self._phase == "thinking":
            self.go(self.chat.close_thought())
        else:
            self.go(self.chat.restart(context_limit=self._half_context()))

    def _half_context(self) -> int:
        """Return half the context in tokens; 0 if that is too little."""
        half = self.chat.status.context_limit // 2
        return half if half >= LEAST_CONTEXT else 0

    def _escape(self) -> None:
        """Close what is open, else stop what runs, else, the second time, open the list of questions."""
        if self.prompt.escape():
            return
        if self.find_bar.display or self.focused is not self.prompt:
            self._close_find()
            self.prompt.focus()
        elif self._is_running():
            self.front.stop("stop")
        elif self.transcript.finding:
            self._close_find()
        elif time.monotonic() - self._escaped < TWICE_SECONDS:
            self._escaped = -TWICE_SECONDS
            self.front.screen("rewind")
        else:
            self._escaped = time.monotonic()

    def _is_running(self) -> bool:
        return self.chat.busy or bool(self.chat.running_jobs)

    def _interrupt(self) -> None:
        selected = self.get_selected_text() or self.prompt.selected_text
        if selected:
            self.keybar.say(self.front.copy(selected))
            self.clear_selection()
        elif self._is_running():
            self.front.stop("interrupt")
        elif self.prompt.text:
            self.prompt.clear_draft()
            self.keybar.say("cleared: ↑ brings it back")
        elif time.monotonic() - self._armed < ARMED_SECONDS:
            self._leave()
        else:
            self._armed = time.monotonic()
            self.keybar.say(f"{self.keymap.shown('interrupt')} again quits", "warning", ARMED_SECONDS)

    def _leave(self) -> None:
        self.go(self.front.leave("shell"))

    def _to_transcript(self) -> None:
        """Go from the prompt to the conversation, on to the branches if they are shown, and back."""
        if self.focused is self.transcript and self.panes.panel.has_choice:
            self.panes.panel.focus()
        else:
            (self.prompt if self.focused in (self.transcript, self.panes.panel) else self.transcript).focus()

    def _toggle_panes(self) -> None:
        try:
            self.keybar.say(toggle_panes(self.chat, self.front, "", self.keymap.shown("panes")))
        except QchatError as error:
            self.front.note(str(error), "error")

    @on(Panel.BranchChosen)
    def _switch(self, event: Panel.BranchChosen) -> None:
        self.go(self.chat.switch(event.number))

    def _toggle_thoughts(self) -> None:
        self.transcript.toggle_thoughts()
        shown = self.transcript.thoughts == "open"
        self.chat.settings.change("show_thinking", shown, self.keymap.shown("thoughts"))

    def _cycle_thinking(self) -> None:
        """Turn thinking off, on with a budget, or on without one, in turn."""
        settings, key = self.chat.settings, self.keymap.shown("thinking")
        if settings["think"] is False:
            set_thinking(self.chat, True, key)
            set_budget(self.chat, BUDGET, key)
        elif settings["thinking_budget"] is not None:
            set_budget(self.chat, "off", key)
        else:
            set_thinking(self.chat, False, key)
        self.show_keys()
        self.keybar.say(describe_thinking(self.chat))

    # --- requests of the transcript ---

    @on(CopyRequested)
    def _copy_block(self, event: CopyRequested) -> None:
        self.keybar.say(f"{event.what}: {self.front.copy(event.text)}")

    @on(TablesRequested)
    def _show_tables(self, event: TablesRequested) -> None:
        tables = whole_tables(event.source)
        if tables:
            self.app.push_screen(TableScreen(tables, event.number))
        else:
            self.keybar.say("no table here")

    @on(EditRequested)
    def _edit_question(self, event: EditRequested) -> None:
        turn = self._question_before(event.turn)
        self.put_prompt(f"/edit {turn.number} {turn.question}")

    @on(RetryRequested)
    def _retry(self, event: RetryRequested) -> None:
        """Answer a question again, an earlier one on a new branch."""
        if event.turn == len(self.chat.state.turns):
            self.run_line("/retry")
        else:
            turn = self._question_before(event.turn)
            self._ask_again(turn.number, turn.question)

    def _ask_again(self, number: int, question: str) -> None:
        """Ask an earlier question in its own place again, now or once the reply has ended."""
        ask = partial(self.chat.edit, number, question)
        if self.chat.has_turns_to_come:
            self.chat.line_up(f"/edit {number} {question}", ask)
        else:
            self.go(ask())

    @on(ForkRequested)
    def _fork(self, event: ForkRequested) -> None:
        self.run_line(f"/fork {event.turn}")

    @on(SiblingRequested)
    def _show_sibling(self, event: SiblingRequested) -> None:
        turn = self.chat.state.turns[event.turn - 1]
        siblings = turn.siblings
        if len(siblings) > 1:
            place = siblings.index(turn.node) + event.step
            self.go(self.chat.switch(siblings[place % len(siblings)]))

    @on(MenuRequested)
    def _offer(self, event: MenuRequested) -> None:
        self.go(self._choose_for(event.turn))

    async def _choose_for(self, turn: int) -> None:
        options = [
            ("edit", "ask it differently"),
            ("retry", "answer it again"),
            ("fork", "a new branch after it"),
        ]
        if len(self.chat.state.turns[turn - 1].siblings) > 1:
            options.append(("diff", "compare its answers"))
        match await self.front.choose(f"Question {turn}", options):
            case "diff":
                self.run_line(f"/diff {turn}")
            case "edit":
                self._edit_question(EditRequested(turn))
            case "retry":
                self._retry(RetryRequested(turn))
            case "fork":
                self.run_line(f"/fork {turn}")

    def _question_before(self, turn: int) -> Turn:
        """Return the turn of the user's question that led to a turn; results of tools may lie between."""
        turns = self.chat.state.turns[:turn]
        return last_question(turns) or turns[-1]

    def on_text_selected(self) -> None:
        """Copy a selection at once, if the settings say so."""
        selected = self.get_selected_text()
        if selected and self.chat.settings["copy_on_select"]:
            self.keybar.say(self.front.copy(selected))

    # --- find ---

    @on(FindRequested)
    def _open_find(self) -> None:
        self.find_bar.open()
        self._sought(FindBar.Sought(self.find_bar.value))

    def _close_find(self) -> None:
        """Leave no marks behind."""
        self.find_bar.close()
        self.transcript.find("")
        self.keybar.hush()

    @on(FindBar.Sought)
    def _sought(self, event: FindBar.Sought) -> None:
        if self.find_bar.display:
            self.transcript.find(event.text)
            self._show_found()

    @on(FindBar.Stepped)
    def _stepped(self, event: FindBar.Stepped) -> None:
        step = self.transcript.find_next if event.step > 0 else self.transcript.find_previous
        step()
        self._show_found()

    def _show_found(self) -> None:
        """Show which match of how many this is, and the keys, for as long as the row is open."""
        line = self.find_bar.describe(*self.transcript.found, self.keymap.shown("stop"))
        self.keybar.say(line, seconds=OPEN_SECONDS)
