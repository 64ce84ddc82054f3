"""The input of the line-based chat: with editing, history and completion at a terminal, else plain lines.

A block between triple quotes is one message. Refuses nothing that can be typed.
"""

import asyncio
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...core.errors import QchatError, UsageError
from ..commands import completions
from ..text.output import printable, write
from ..user.attachments import complete as complete_path
from ..user.editor import edit
from ..user.history import History

if TYPE_CHECKING:
    from ..chat.controller import Chat

QUOTES = '"""'
PREFIXES = "rRfFbBuU"  # of Python's strings
# where code opens a string whose end is on another line; the quotes in `say """ to` open none
STRING_BEGINS = re.compile(rf'(?:^|[\s(=,\[{{:])[{PREFIXES}]{{0,2}}"""(?=\S|$)(?!.*""")')


class EndOfBlock(EOFError):
    """The end of the input inside a block between triple quotes; `text` is what the block holds."""

    def __init__(self, text: str):
        super().__init__("the input ended inside triple quotes")
        self.text = text


class Interrupted(Exception):
    """Ctrl+c at an empty prompt or a question; a KeyboardInterrupt would end the event loop."""


class Reader(Protocol):
    """A source of lines; `edits` tells whether a draft can stand in the prompt to be changed."""

    edits: bool

    async def line(self, prompt: str, draft: str = "") -> str:
        """Read one line, or several that were pasted. Raises EOFError, Interrupted, UsageError."""
        ...

    async def answer(self, prompt: str) -> str:
        """Read the answer to a question of ours, which no history keeps. Raises as `line`."""
        ...


async def message(reader: Reader, prompt: str, draft: str = "") -> str:
    """Read a message or a command: a line, or the lines between triple quotes.

    Raises as `Reader.line`, and EndOfBlock.
    """
    line = await reader.line(prompt, draft)
    begin = line.lstrip()
    if not begin.startswith(QUOTES):
        return line
    block = _Block()
    closed = block.add(begin.removeprefix(QUOTES))
    while not closed:
        try:
            closed = block.add(await reader.line(""))
        except EOFError:
            raise EndOfBlock(block.text) from None
    return block.text


class _Block:
    """The lines between triple quotes. Code in them may hold docstrings, whose quotes end nothing."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._in_string = False
        self._alone = False  # the quotes that open the block stand alone, and so will those that close it

    @property
    def text(self) -> str:
        return "\n".join(self._lines).strip("\n")

    def add(self, text: str) -> bool:
        """Add what was read; return whether its last line closes the block."""
        first, lines = not self._lines, text.split("\n")
        self._alone = self._alone or (first and not lines[0].strip())
        for line in lines[:-1]:
            self._follow_strings(line)
        opens_and_closes = first and len(lines) == 1 and lines[0].rstrip().endswith(QUOTES)
        closes = opens_and_closes or self._closes(lines[-1])
        if closes:
            lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        else:
            self._follow_strings(lines[-1])
        self._lines += lines
        return closes

    def _closes(self, line: str) -> bool:
        text = line.strip()
        if self._in_string or text.count(QUOTES) % 2 == 0:
            return False
        if text == QUOTES:
            return True
        return not self._alone and text.endswith(QUOTES) and not text.lstrip(PREFIXES).startswith(QUOTES)

    def _follow_strings(self, line: str) -> None:
        if line.count(QUOTES) % 2 and (self._in_string or STRING_BEGINS.search(line.rstrip())):
            self._in_string = not self._in_string


class PlainReader:
    """Reads the lines of stdin as they are: of a pipe, a file, or a dumb terminal."""

    edits = False

    def __init__(self, *, shown: bool):
        self._shown = shown
        self._pending: asyncio.Future[bytes] | None = None
        self._lines = 0

    async def line(self, prompt: str, draft: str = "") -> str:
        del draft
        if self._shown:
            write(sys.stdout, prompt)
        # a cancelled read goes on, and its line is the next one
        self._pending = self._pending or _read_in_background()
        line = await asyncio.shield(self._pending)
        self._pending = None
        if not line:
            raise EOFError
        self._lines += 1
        return self._decode(line.rstrip(b"\r\n"))

    def _decode(self, line: bytes) -> str:
        encoding = sys.stdin.encoding or "utf-8"
        encoding = "utf-8" if encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968") else encoding
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            wrong = f"byte {error.start + 1} is {line[error.start]:#x}"
            raise UsageError(f"line {self._lines} of the input is not {encoding.upper()}: {wrong}") from error

    async def answer(self, prompt: str) -> str:
        return await self.line(prompt)


def _read_in_background() -> "asyncio.Future[bytes]":
    """Read the next line of stdin, empty at its end, in a thread that keeps no process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bytes] = loop.create_future()

    def read() -> None:
        try:
            line = sys.stdin.buffer.readline()
        except (OSError, ValueError):  # closed meanwhile
            line = b""
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(future.set_result, line)

    threading.Thread(target=read, daemon=True).start()
    return future


class TypedAhead:
    """A context in which the terminal neither echoes nor changes what is typed.

    So the next prompt gets it as it is, enter included, and no reply is written around it. Ctrl+c stays a
    signal.
    """

    def __enter__(self) -> "TypedAhead":
        import termios

        self._usual = termios.tcgetattr(sys.stdin)
        quiet = termios.tcgetattr(sys.stdin)
        quiet[0] &= ~termios.ICRNL
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0
        self._quiet = quiet
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        return self

    def __exit__(self, *_: object) -> None:
        import termios

        with suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._usual)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Restore the terminal for another program."""
        import termios

        self.__exit__()
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._quiet)


class PromptReader:
    """Reads with history, search, completion and an editor; `toolbar` returns the text below the prompt."""

    edits = True

    def __init__(self, chat: "Chat", history: History, toolbar: Callable[[], str] | None, *, colour: bool):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import ColorDepth

        depth = None if colour else ColorDepth.DEPTH_1_BIT
        self._session: PromptSession[str] = PromptSession(
            history=_adapted(history),
            completer=_completer(chat),
            complete_while_typing=False,
            key_bindings=_keys(history),
            bottom_toolbar=toolbar,
            color_depth=depth,
        )
        self._question: PromptSession[str] = PromptSession(
            color_depth=depth, interrupt_exception=Interrupted, eof_exception=Interrupted
        )

    async def line(self, prompt: str, draft: str = "") -> str:
        return await self._session.prompt_async(prompt, default=draft, handle_sigint=False)

    async def answer(self, prompt: str) -> str:
        return await self._question.prompt_async(prompt, handle_sigint=False)


def can_prompt() -> bool:
    """Whether stdin and stdout are a terminal that can move its cursor."""
    dumb = os.environ.get("TERM", "dumb") in ("", "dumb")
    return sys.stdin.isatty() and sys.stdout.isatty() and not dumb


def _adapted(history: History) -> Any:
    from prompt_toolkit.history import History as PromptHistory

    class Adapted(PromptHistory):
        """The history that both front ends share."""

        def load_history_strings(self) -> Iterable[str]:
            return reversed(history.entries)

        def store_string(self, string: str) -> None:
            history.add(string)

    return Adapted()


def _completer(chat: "Chat") -> Any:
    from prompt_toolkit.completion import Completer, Completion

    class Commands(Completer):
        """Commands with their arguments, and files after an @."""

        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Completion]:
            del complete_event
            text: str = document.text_before_cursor
            for one in completions(text, chat):
                yield Completion(one.line, -len(text), display=one.shown, display_meta=one.help)
            word = text.split()[-1] if text and not text[-1].isspace() else ""
            if word.startswith("@"):
                for path in complete_path(word[1:], Path.cwd()):
                    yield Completion(f"@{path}", -len(word), display=path)

    return Commands()


def _keys(history: History) -> Any:
    """Return keys besides the usual ones, which begin a new line or an editor."""
    from prompt_toolkit.application import run_in_terminal
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("c-j", filter=typing)
    @keys.add("escape", "enter", filter=typing)
    def newline(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter", filter=typing)
    def enter(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("c-c", filter=typing)
    def clear(event: Any) -> None:
        if event.current_buffer.text:
            history.add(event.current_buffer.text)
            event.current_buffer.reset()
        else:
            event.app.exit(exception=Interrupted())

    @keys.add("c-g", filter=typing)
    def editor(event: Any) -> None:
        buffer = event.current_buffer

        async def change() -> None:
            try:
                text = await run_in_terminal(lambda: edit(buffer.text), in_executor=True)
            except QchatError as error:
                sentence = str(error)
                await run_in_terminal(lambda: write(sys.stderr, f"{printable(sentence)}\n"))
                return
            if text is not None:
                buffer.text, buffer.cursor_position = text, len(text)

        event.app.create_background_task(change())

    return keys
