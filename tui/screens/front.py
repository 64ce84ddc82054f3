"""The full-screen app as chat and commands see it: their calls change its widgets."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol

from textual.app import App
from textual.timer import Timer

from ...core.conversation.summary import ConversationState, Turn
from ...core.errors import QchatError
from ...core.events import Done
from ..chat.controller import Chat
from ..chat.decoding import Batch
from ..chat.jobs import Job
from ..chat.kept_results import Result
from ..chat.live_bench import live_line
from ..chat.meter import Status, figures
from ..chat.start import Goal
from ..chat.view import NoteKind
from ..chat.window import Window
from ..commands.base import Screen as ScreenName
from ..commands.parameters import schema_name
from ..tasks.progress import format_age, format_seconds, job_parts
from ..text.report import Report
from ..text.sanitise import cells
from ..tools.consent import Decision, Question
from ..user.clipboard import copy
from ..user.keymap import Keymap
from ..user.themes import Shelf
from ..widgets.keybar import Keybar
from ..widgets.prompt import Prompt
from ..widgets.status import Lent
from ..widgets.status import Status as StatusRow
from ..widgets.transcript.transcript import Transcript
from .consent import ask_tool
from .dialogs import Choose, Confirm
from .panes import ScreenPanes

# the module of each screen; without one a report is printed
NAMES = ("models", "sessions", "rewind", "help", "stats", "theme", "serve", "probs", "palette")
SCREENS = {name: name for name in NAMES} | {"keys": "help", "convert": "convert_form"}
JOB_SECONDS = 0.25
ARMED_SECONDS = 2.0  # in which a second press counts


class ChatView(Protocol):
    """The parts of the chat screen that a front changes."""

    chat: Chat
    transcript: Transcript
    prompt: Prompt
    keybar: Keybar
    panes: ScreenPanes
    typed: dict[str, str]
    window: Window

    @property
    def running_app(self) -> App[Any]: ...
    def set_timer(self, delay: float, callback: Callable[[], None]) -> Timer: ...
    def show_facts(self) -> None: ...
    def show_status(self, status: Status) -> None: ...
    def show_keys(self) -> None: ...
    def put_prompt(self, text: str) -> None: ...
    def show_pictures(self, how: str) -> None: ...
    def run_chosen(self, line: str | None) -> None: ...


class AppFront:
    """Implements `commands.Front` on a chat screen."""

    def __init__(self, view: ChatView, keymap: Keymap):
        self.keymap = keymap
        self._view = view
        self._blocks: dict[int, Any] = {}
        self._changed: dict[int, Job] = {}
        self.confirming = False  # whether a command runs that only confirms
        self._asked: tuple[Job, float] | None = None  # what a second press stops, and since when

    @property
    def _chat(self) -> Chat:
        return self._view.chat

    def to_terminal(self, sequence: str) -> None:
        """Write an escape sequence, if there is a terminal."""
        driver = self._view.running_app._driver
        if driver is not None and not driver.is_headless:
            driver.write(sequence)

    # the view of the chat

    def question(self, turn: Turn) -> None:
        self._view.transcript.add_question(turn)
        self._view.transcript.begin_answer(turn)
        self._view.panes.begin()

    def pictures(self, turn: Turn) -> None:
        self._view.transcript.show_pictures(turn)

    def events(self, batch: Batch) -> None:
        self._view.transcript.feed(batch)
        self._view.panes.follow(batch)

    def finished(self, done: Done, turn: Turn) -> None:
        told = done.detail == self._chat.status.reason  # of a death, in a note and in the status row
        self._view.transcript.end_answer(replace(done, detail="") if told else done, turn)
        if self._chat.show_stats:
            self.note(figures(done))
        if self._chat.settings["live_bench"]:
            self.note(live_line(turn))
        # a conversation gets its number with its first reply
        self._view.transcript.conversation = self._chat.state.conversation
        if not self._chat.queue:
            self._view.typed.clear()
            self._notify("the reply failed" if done.finish_reason == "error" else "the reply is there")
        self._view.show_facts()

    async def ask_tool(self, question: Question) -> Decision:
        return await ask_tool(self._view.running_app, question)

    def _notify(self, what: str, seconds: float | None = None) -> None:
        """Notify the user of an end, by default a reply's, if another window has the focus."""
        if not self._view.running_app.app_focus:
            seconds = self._chat.status.seconds if seconds is None else seconds
            self._view.window.notify(self._chat, what, seconds)

    def returned(self, text: str) -> None:
        """Put the question back into the prompt, or into the history if the user types already."""
        text = self._view.typed.get(text, text)
        if self._has_no_place:
            self._view.prompt.remember(text)
            self._view.keybar.say("not answered: the question is in the history (↑)", "warning")
        else:
            self._view.prompt.put(text)

    @property
    def _has_no_place(self) -> bool:
        """Whether the prompt is the user's: what was queued must not slip in between two lines."""
        prompt = self._view.prompt
        return prompt.is_in_use if self._chat.doing_queued else bool(prompt.text)

    def rebuilt(self, state: ConversationState) -> None:
        self._view.transcript.show(state)
        self._view.panes.begin()
        self._view.show_facts()

    def status(self, status: Status) -> None:
        self._view.show_status(status)

    def note(self, text: str, kind: NoteKind = "info") -> None:
        """Add a note to the conversation; what only confirms a choice is in the key bar for a moment."""
        brief = self.confirming and kind == "info" and cells(text) < self._view.keybar.size.width
        if brief and "\n" not in text:
            self._view.keybar.say(text)
        else:
            self._view.transcript.add_note(text, kind)

    def report(self, report: Report) -> None:
        self._view.transcript.add_report(report)
        self._view.transcript.go_to_end()

    def results(self, results: Sequence[Result]) -> None:
        for one in results:
            self._view.transcript.add_kept(one.turn, one.when, one.report)

    def job(self, job: Job) -> None:
        self._blocks[id(job)] = self._view.transcript.add_report(_block(job))
        self._view.transcript.go_to_end()
        self._view.show_keys()

    def job_changed(self, job: Job) -> None:
        """Draw the job's block again, at most a few times a second."""
        if not self._changed:
            self._view.set_timer(JOB_SECONDS, self._draw_jobs)
        self._changed[id(job)] = job
        if job.state in ("done", "failed"):
            self._notify(f"{job.title}: {job.state}", job.seconds)

    def _draw_jobs(self) -> None:
        changed, self._changed = self._changed, {}
        for number, job in changed.items():
            self._view.transcript.update_report(self._blocks[number], _block(job))
        self._view.show_keys()
        self._view.show_status(self._chat.status)

    def stop(self, key: str) -> None:
        """Stop the reply or the newest job; one that has run for long only at the second press of `key`."""
        job, now = self._chat.job_to_stop, self._chat.clock()
        if job is not None and job.is_long and not job.stopping:
            before, self._asked = self._asked, (job, now)
            if before is None or before[0] is not job or now - before[1] > ARMED_SECONDS:
                again = f"{self.keymap.shown(key)} again stops the {job.method} ({format_age(job.age)} in)"
                self._view.keybar.say(again, "warning", ARMED_SECONDS)
                return
        if job is not None:
            left = f"the {job.method} is out of the queue" if job.waits_for else f"stopping the {job.method}…"
            self._view.keybar.say(left)
        self._chat.stop()

    # the front end of the commands

    async def confirm(self, question: str) -> bool:
        return await self._view.running_app.push_screen_wait(Confirm(question))

    async def choose(self, title: str, options: list[tuple[str, str]]) -> str | None:
        return await self._view.running_app.push_screen_wait(Choose(title, options))

    @property
    def can_edit(self) -> bool:
        return True

    def put_prompt(self, text: str) -> None:
        """Put a text into the prompt, or into the history if the user types already."""
        if self._has_no_place:
            self._view.prompt.remember(text)
            self._view.keybar.say("you are typing: it is in the history (↑)", "warning")
        else:
            self._view.put_prompt(text)

    async def edit_text(self, text: str) -> str | None:
        from ..user.editor import edit, startable_editor

        startable_editor()  # refused here, the screen stays as it is
        with self._view.running_app.suspend():
            return edit(text)

    def copy(self, text: str) -> str:
        driver = self._view.running_app._driver
        return copy(text, driver.write if driver is not None else None)

    def find(self, text: str) -> int:
        """Mark `text`; where there is none of it, later answers are not marked either."""
        count = self._view.transcript.find(text)
        if not count:
            self._view.transcript.find("")
        return count

    def screen(self, name: ScreenName) -> bool:
        module = SCREENS.get(name)
        if module is None:
            return False
        try:
            made = import_module(f".{module}", __package__).make(self._chat, self)
        except QchatError as error:
            self.note(str(error), "error")
            return True
        self._view.running_app.push_screen(made, self._view.run_chosen)
        return True

    def set_theme(self, name: str) -> None:
        Shelf.open().find(name)  # refuses an unknown name here, where the command can still fail
        self._view.running_app.call_later(self._view.running_app.run_action, f"look({name!r})")

    def show_thinking(self, shown: bool) -> None:
        self._view.transcript.thoughts = "open" if shown else "live"

    def show_pictures(self, how: str) -> None:
        self._view.show_pictures(how)

    def show_panes(self, names: Sequence[str]) -> bool:
        self._view.panes.show(names)
        return True

    def mouse(self, on: bool) -> None:
        self._view.running_app.call_later(self._view.running_app.run_action, f"mouse({on!r})")

    async def leave(self, to: Goal) -> None:
        if to == "full":
            self.note("this is the full screen already")
            return
        await self._view.running_app.run_action(f"leave({to!r})")


def describe_chat(row: StatusRow, chat: Chat) -> None:
    """Tell the status row what it shows besides the engine's figures."""
    row.has_model, row.lent = chat.model is not None, lent_memory(chat)
    row.schema = schema_name(chat.settings)


def lent_memory(chat: Chat) -> Lent | None:
    """Return who has the memory of the chat's model, if it was unloaded for a job."""
    if not chat.parked:
        return None
    job = next((one for one in chat.running_jobs if one.alone and one.is_active), None)
    return Lent(job.method if job else "a job", len(chat.queue), job.seconds_left if job else None)


def _block(job: Job) -> Report:
    """Return the job's report under its title and state."""
    parts = job_parts(job)
    if job.state == "failed":
        return Report(f"✖ {job.title} failed", parts, mood="failed")
    if job.state != "running":
        return Report(job.title, parts, f"{job.state} · {format_age(job.seconds)}")
    left = "" if job.seconds_left is None else f"{format_seconds(job.seconds_left)} left · "
    stops = "queued, esc takes it out" if job.waits_for else f"{left}esc stops it"
    return Report(job.title, parts, "stopping…" if job.stopping else stops, "running")
