"""The line-based chat: a prompt, replies as they come, the commands of the app; text is only ever appended.

Ctrl+c stops the reply; pressed twice at an empty prompt it leaves. Without a terminal the chat reads plain
lines and asks nothing. For a screen reader everything is words.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from ...core.conversation.summary import ConversationState, Turn
from ...core.errors import QchatError, UsageError
from ...core.events import Done, Notice, Text, Thought, ToolUse
from ..chat.client import EngineDied
from ..chat.controller import Chat
from ..chat.decoding import Batch
from ..chat.jobs import Job
from ..chat.kept_results import Result
from ..chat.live_bench import live_line
from ..chat.meter import Status, figures
from ..chat.start import Beginning, Goal
from ..chat.turns import last_question
from ..chat.view import NoteKind, View
from ..chat.window import Window
from ..commands import parse, perform
from ..commands.base import Screen, first_words, plural
from ..commands.parameters import schema_name
from ..commands.tools import ask_about_project
from ..tasks.progress import job_parts
from ..text.output import has_full_terminal, printable
from ..text.report import Report, Table
from ..tools.consent import Decision, Question, Scope
from ..tools.rounds import describe_result
from ..user.attachments import attach, pictures
from ..user.clipboard import copy
from ..user.editor import edit
from ..user.history import History
from ..user.sequences import takes_sequences
from ..user.settings import Settings
from .printer import Printer
from .reader import (
    EndOfBlock,
    Interrupted,
    PlainReader,
    PromptReader,
    Reader,
    TypedAhead,
    can_prompt,
    message,
)

TWICE_SECONDS = 2.0
IMPATIENT = 3  # so many ctrl+c within that time end the program
RECAP_CHARACTERS = 2000
FOUND = 20
ARGUMENT_LINES, RESULT_CHARACTERS = 40, 160
GB = 10**9
KEYS = (
    ("enter", "send"),
    ("ctrl+j, alt+enter, \\ enter", 'new line; """ begins and ends several lines'),
    ("up, down", "earlier prompts"),
    ("ctrl+r", "search earlier prompts"),
    ("tab", "complete a command, its words, or @file"),
    ("ctrl+g", "write the prompt in $EDITOR"),
    ("ctrl+c", "stop the reply, clear the prompt; twice at an empty prompt: leave"),
    ("ctrl+d", "leave"),
)


def run(
    make_chat: Callable[[View], Chat],
    *,
    settings: Settings,
    history: History,
    beginning: Beginning | None,
    runner: asyncio.Runner,
) -> tuple[int, Chat | None]:
    """Chat until the user leaves; return the exit code, and the chat if the full screen shall go on with it.

    Without a `beginning` a chat goes on that another front end began. Raises QchatError if no model can be
    loaded and nobody is there to choose another one.
    """
    repl = Repl(make_chat, settings, history)
    code = runner.run(repl.run(beginning))
    return code, repl.chat if repl.goal == "full" else None


class Repl:
    """The front end of chat and commands, in lines."""

    def __init__(self, make_chat: Callable[[View], Chat], settings: Settings, history: History):
        self.settings = settings
        self.spoken = bool(settings["screen_reader"])
        self.out = Printer(spoken=self.spoken, measure=settings["measure"])
        self.chat = make_chat(self)
        self.attended = sys.stdin.isatty() and sys.stdout.isatty()
        self._has_toolbar = False
        self.reader = self._reader(history)
        self._terminal = TypedAhead() if self.reader.edits else None
        self._draft = self._typed = ""
        self._conversation: int | None = None
        self._leaving = False
        self.goal: Goal = "shell"
        self._code = 0
        self._changed = asyncio.Event()
        self._interrupts: list[float] = []
        self._main: asyncio.Task[Any] | None = None
        self._reading: asyncio.Task[str] | None = None
        self._thought: _RunningThought | None = None
        self._jobs: set[Job] = set()  # jobs whose end was not yet told
        speaks = self.attended and not self.spoken and takes_sequences(sys.stdout)
        self._window = Window(self._to_terminal) if speaks else None

    def _reader(self, history: History) -> Reader:
        if not can_prompt():
            return PlainReader(shown=self.attended)
        self._has_toolbar = not self.spoken
        toolbar = self._toolbar if self._has_toolbar else None
        return PromptReader(self.chat, history, toolbar, colour=self.out.form.colour)

    @property
    def _prompt(self) -> str:
        schema = "" if self._has_toolbar else schema_name(self.settings)
        if self.spoken:
            return f"You (schema {schema}): " if schema else "You: "
        mark = "❯ " if self.out.form.unicode else "> "
        return f"schema {schema} {mark}" if schema else mark

    def _toolbar(self) -> str:
        """Return speed, context, memory, and the schema of answers."""
        status = self.chat.status
        parts = [f"{status.tokens_per_s:,.1f} tok/s"] if status.last else []
        if status.context_limit:
            parts.append(f"ctx {status.context_tokens / status.context_limit:.0%}")
        if status.active_nbytes:
            parts.append(f"{status.active_nbytes / GB:,.1f} GB")
        if schema := schema_name(self.settings):
            parts.append(f"schema {schema}")
        return " · ".join([*parts, "/help"])

    # the loop

    async def run(self, beginning: Beginning | None) -> int:
        self._main = asyncio.current_task()
        self._listen_to_signals()
        with self._terminal or nullcontext():
            try:
                await (self._take_over() if beginning is None else self._begin(beginning))
                while not self._leaving:
                    await self._turn()
            except asyncio.CancelledError:
                if not self._code:
                    raise
            finally:
                if self.goal == "full":
                    self.chat.leave_view()
                else:
                    await self.chat.quit()
                if self._window is not None:
                    self._window.close()
        return self._code

    async def _take_over(self) -> None:
        """Go on with what another front end began."""
        self._greet()
        self.chat.take_over()
        await self._settled()

    def _greet(self) -> None:
        name = self.chat.model.name if self.chat.model else "no model is loaded"
        self.out.line(f"{name}; /help lists the commands, ctrl+d leaves", "dim")

    async def _begin(self, beginning: Beginning) -> None:
        self.chat.show_stats = self.chat.show_stats or beginning.stats
        try:
            await self.chat.load(beginning.model, conversation=beginning.conversation)
        except QchatError as error:
            if not self.attended:
                raise
            self._complain(error)
        if beginning.said:
            self.out.line(beginning.said, "dim")
        if self.attended:
            self._greet()
            await ask_about_project(self.chat, self)
        if beginning.text:
            await self._do(beginning.text)

    async def _turn(self) -> None:
        """Read one message and do what it asks."""
        draft, self._draft = self._draft, ""
        self.out.fresh_line()
        self._reading = asyncio.create_task(message(self.reader, self._prompt, draft))
        try:
            line = await self._reading
        except EndOfBlock as end:
            if end.text.strip():
                await self._do(end.text)
            self._leaving = True
        except EOFError:
            self._leaving = True
        except UsageError as error:
            if not self.attended:
                raise
            self._complain(error)
        except (Interrupted, asyncio.CancelledError):
            if self._code:
                raise
            self._interrupted_at_prompt()
        else:
            self._typed = line
            await (self._restart() if self._is_dead() and not line.strip() else self._do(line))
        finally:
            self._reading = None

    async def _do(self, line: str) -> None:
        """Send `line` or run its command, and wait until nothing runs."""
        try:
            if isinstance(parse(line), str):
                typed, line = line, attach(line, Path.cwd())
                self.chat.pictures[line] = pictures(typed, Path.cwd())
        except QchatError as error:
            self.note(str(error), "error")
            return
        await perform(line, self.chat, self)
        await self._settled()

    async def _settled(self) -> None:
        while self._is_working() and not self._leaving:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.2)

    def _is_working(self) -> bool:
        waiting = bool(self.chat.queue) and self.chat.model is not None and not self._is_dead()
        return self.chat.busy or waiting or bool(self._jobs)

    def _is_dead(self) -> bool:
        return self.chat.status.phase == "dead"

    async def _restart(self) -> None:
        await self._tried(self.chat.restart())
        await self._settled()

    async def _tried(self, work: Awaitable[Any]) -> None:
        try:
            await work
        except QchatError as error:
            self._complain(error)

    def _complain(self, error: QchatError) -> None:
        """Print an error, except an engine's death that the chat has already reported."""
        if not (isinstance(error, EngineDied) and str(error) in self.chat.status.reason):
            self.note(str(error), "error")

    # interruptions

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
            loop.add_signal_handler(signal.SIGINT, self.interrupt)
            for number in (signal.SIGTERM, signal.SIGHUP):
                loop.add_signal_handler(number, self._end, 128 + number)

    def interrupt(self) -> None:
        """Handle ctrl+c outside of the prompt: stop what runs, or leave a question."""
        if self._reading is not None and not self._reading.done():
            self._reading.cancel()
            return
        if not self._is_working():
            self._interrupted_at_prompt()
        elif self._pressed() >= IMPATIENT:
            self._end(130)
        else:
            self.chat.stop()

    def _interrupted_at_prompt(self) -> None:
        if self._pressed() >= 2:
            self._leaving = True
        else:
            self.note("ctrl+c again leaves")

    def _pressed(self) -> int:
        """Count this ctrl+c; return how many there were lately."""
        now = time.monotonic()
        self._interrupts = [when for when in self._interrupts if now - when < TWICE_SECONDS] + [now]
        return len(self._interrupts)

    def _end(self, code: int) -> None:
        self._code, self._leaving = code, True
        if self._main is not None:
            self._main.cancel()

    # the view of the chat

    def question(self, turn: Turn) -> None:
        """Print the question, unless it stands in the prompt above; of results only what they are."""
        if turn.results:
            for result in turn.results:
                self.note(f"{describe_result(result)}: {first_words(result.text, RESULT_CHARACTERS)}")
        elif self.attended and turn.question != self._typed:
            self.out.line(f"{self._prompt}{first_words(turn.question, 200)}", "dim")
        self._typed = ""
        self._thought = None
        self.out.begin_answer()
        self._answering = False

    def pictures(self, turn: Turn) -> None:
        """Tell of the question's pictures in a sentence each, at a terminal."""
        for picture in turn.pictures if self.attended else ():
            name = first_words(printable(picture.name), 200)
            self.note(f"picture {name}, {picture.width:,} by {picture.height:,} pixels")

    def events(self, batch: Batch) -> None:
        for event in batch:
            match event:
                case Thought():
                    self._think(event)
                case Text(text):
                    self._answer(text)
                case Notice(text):
                    self.note(text)
                case ToolUse(name):
                    self.note(f"the model calls {name}")

    def _think(self, piece: Thought) -> None:
        if self._thought is None:
            self._thought = _RunningThought()
        self._thought.tokens += piece.tokens
        if self.chat.settings["show_thinking"] and self.attended:
            self.out.thought(piece.text)

    def _answer(self, text: str) -> None:
        if not self._answering:
            self._answering = True
            self._end_thought()
            if self.spoken and self.attended:
                self.out.raw("Qwen: ")
        self.out.answer(text)

    def _end_thought(self) -> None:
        """Print the thought's line, with time and tokens."""
        if self._thought is None or not self.attended:
            return
        seconds = time.monotonic() - self._thought.begin
        mark = "▸ " if self.out.form.unicode else "> "
        text = f"{mark}thought {seconds:.1f} s · {self._thought.tokens:,} tokens"
        self.out.line(f"Thought ({seconds:.1f} s)." if self.spoken else text, "dim")
        self._thought = None

    def finished(self, done: Done, turn: Turn) -> None:
        self._end_thought()
        self.out.end_answer()
        ended = {"cancelled": "stopped", "length": "the reply was cut at its token limit"}
        said = done.detail or ended.get(done.finish_reason)
        if said and said != self.chat.status.reason:  # unless the chat has already told of a death
            self.note(said)
        if self.chat.show_stats:
            self.note(figures(done))
        if self.chat.settings["live_bench"]:
            self.note(live_line(turn))
        self._changed.set()

    def returned(self, text: str) -> None:
        self.out.end_answer()
        self.put_prompt(text)

    def rebuilt(self, state: ConversationState) -> None:
        """Introduce another conversation by its last turn; nothing is drawn again."""
        if state.conversation == self._conversation or not self.attended:
            return
        self._conversation = state.conversation
        if not state.turns:
            return
        last, asked = state.turns[-1], last_question(state.turns)
        self.out.line(f"{state.title or 'conversation'} · {plural(len(state.turns), 'turn')}", "title")
        self.out.line(f"{self._prompt}{first_words((asked or last).question, 200)}", "dim")
        self.pictures(asked or last)
        self.out.line(last.answer[-RECAP_CHARACTERS:])

    def status(self, status: Status) -> None:
        if self.attended and status.phase in ("loading", "reading") and status.total:
            self.out.progress(status.phase, status.done / status.total)
        if self._window is not None:
            self._window.show(self.chat)
        self._changed.set()

    def note(self, text: str, kind: NoteKind = "info") -> None:
        self.out.note(text, kind)

    def report(self, report: Report) -> None:
        self.out.report(report)

    def results(self, results: Sequence[Result]) -> None:
        if results and self.attended:
            self.note(f"kept with this conversation: {plural(len(results), 'result')}; /results shows them")

    def job(self, job: Job) -> None:
        self._jobs.add(job)
        self.note(f"{job.title}: ctrl+c stops it")

    def job_changed(self, job: Job) -> None:
        if job.state != "running":
            self._jobs.discard(job)
            self.out.report(Report(f"{job.title}: {job.state}", job_parts(job)))
        elif job.waits_for:
            self.note(f"{job.title} waits for {job.waits_for}")
        else:
            last = next((one for one in reversed(job.events) if one["event"] == "progress"), None)
            if last is not None and last["total"] and self.attended:
                self.out.progress(job.method, last["done"] / last["total"])
        self._changed.set()

    async def ask_tool(self, question: Question) -> Decision:
        """Ask about a call; any other words than the listed ones are a refusal and its reason."""
        if not self.attended:
            self.note(f"the model wants to call {question.tool.name}, which was refused", "warning")
            return Decision(False, reason="nobody can be asked here")
        self.out.line(question.title, "title")
        for line in question.lines()[:ARGUMENT_LINES]:
            self.out.line(f"  {line}")
        if (more := len(question.lines()) - ARGUMENT_LINES) > 0:
            self.out.line(f"  … {more:,} more lines", "dim")
        lasting = ", [c]onversation, [a]lways" if question.may_last else ""
        answer = await self._ask(f"[y]es once{lasting}, [n]o, or why not: ")
        words = (answer or "").strip()
        scopes: dict[str, Scope] = {"y": "once", "yes": "once"}
        if question.may_last:
            scopes |= {"c": "conversation", "a": "always"}
        if scope := scopes.get(words.lower()):
            return Decision(True, scope)
        return Decision(False, reason="" if words.lower() in ("n", "no") else words)

    # the front end of the commands

    async def confirm(self, question: str) -> bool:
        answer = await self._ask(f"{question} [y/N] ")
        return answer is not None and answer.strip().lower() in ("y", "yes")

    async def choose(self, title: str, options: list[tuple[str, str]]) -> str | None:
        self.out.line(title, "title")
        for number, (_, label) in enumerate(options, 1):
            self.out.line(f"{number:>3}  {label}")
        answer = await self._ask(f"1 to {len(options)}, or nothing: ")
        if answer is None or not answer.strip():
            return None
        if not answer.strip().isdecimal() or not 1 <= int(answer) <= len(options):
            raise UsageError(f"{answer.strip()!r:.40} is not among them, wanted 1 to {len(options)}")
        return options[int(answer) - 1][0]

    async def _ask(self, prompt: str) -> str | None:
        """Ask the user; return None if nobody answers."""
        if not self.attended:
            self.note("nobody is here to be asked, so nothing is done", "warning")
            return None
        self.out.fresh_line()
        self._reading = asyncio.create_task(self.reader.answer(printable(prompt)))
        try:
            return await self._reading
        except (EOFError, Interrupted):
            return None
        except asyncio.CancelledError:
            if self._code:
                raise
            return None  # ctrl+c where no terminal reports it

    @property
    def can_edit(self) -> bool:
        return self.reader.edits

    def put_prompt(self, text: str) -> None:
        if self.reader.edits:
            self._draft = text
        else:
            self.note(f"taken back: {text}")

    async def edit_text(self, text: str) -> str | None:
        if not self.attended:
            raise UsageError("there is no terminal for an editor: give the text with the command")
        with self._terminal.lent() if self._terminal else nullcontext():
            return await asyncio.to_thread(edit, text)

    def copy(self, text: str) -> str:
        return copy(text, self._to_terminal if self.attended and takes_sequences(sys.stdout) else None)

    def _to_terminal(self, sequence: str) -> None:
        sys.stdout.write(sequence)
        sys.stdout.flush()

    def find(self, text: str) -> int:
        """Print the lines with `text`, since nothing can be scrolled to."""
        wanted, rows = text.lower(), []
        for turn in self.chat.state.turns:
            for part, whole in (("question", turn.question), ("answer", turn.answer)):
                lines = [line for line in whole.split("\n") if wanted in line.lower()]
                rows += [(str(turn.number), part, line.strip()) for line in lines]
        if rows:
            self.report(Report("", (Table(("turn", "", "line"), rows[:FOUND]),)))
        return len(rows)

    def screen(self, name: Screen) -> bool:
        if name == "keys":
            self.report(Report("Keys", (Table(("key", ""), KEYS),)))
        return name == "keys"

    def set_theme(self, name: str) -> None:
        self.note(f"the theme {name} is for the full screen; lines have the terminal's colours")

    def show_thinking(self, shown: bool) -> None:
        """Do nothing: every thought asks the chat whether it is shown."""

    def show_pictures(self, how: str) -> None:
        """Do nothing: pictures are told of in lines."""

    def show_panes(self, names: Sequence[str]) -> bool:
        del names
        return False

    def mouse(self, on: bool) -> None:
        self.note("the mouse is the terminal's here" if on else "the mouse stays the terminal's")

    async def leave(self, to: Goal) -> None:
        if to == "plain":
            self.note("this is the line-based chat already")
            return
        if to == "full" and (self.spoken or not has_full_terminal()):
            raise UsageError("the full screen needs a terminal that can show it, and no screen reader")
        self.goal, self._leaving = to, True


class _RunningThought:
    """A thought that is being written: when it began, and its tokens so far."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.tokens = 0
