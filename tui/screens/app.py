"""The full-screen app: themes, signals, start and exit; everything else is in its screens.

However it ends, the terminal is restored and the draft is in the history; the engine's process is gone,
unless the line-based chat goes on with it.
"""

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.filter import Monochrome, NoColor
from textual.screen import Screen
from textual.worker import WorkerFailed

from ...core.errors import QchatError
from ..chat.controller import Chat, View
from ..chat.start import Beginning, Goal
from ..tasks.progress import format_age
from ..user.history import History
from ..user.keymap import Keymap
from ..user.settings import Settings
from ..user.themes import Shelf, extra_defaults
from .chat import ChatScreen
from .dialogs import Confirm

LEAVE_SECONDS = 6.0


class QchatApp(App[Goal]):
    """The app; `run` returns where the user goes next, and `failure` is an unexpected error."""

    CSS_PATH = Path(__file__).parents[2] / "themes" / "app.tcss"
    TITLE = "qchat"
    ENABLE_COMMAND_PALETTE = False  # ours lists more
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "leave", "Quit", show=False, priority=True, id="quit"),
    ]
    PAUSE_GC_ON_SCROLL = True

    def __init__(
        self,
        make_chat: Callable[[View], Chat],
        *,
        settings: Settings,
        keymap: Keymap | None = None,
        history: History | None = None,
        beginning: Beginning | None = None,
    ):
        self.shelf = Shelf.open()
        # Textual turns it on only for themes with colours of their own
        self._defaults = {"ansi-background": "ansi_default", **extra_defaults()}
        super().__init__()
        if self.no_color:  # Textual's greys are colours too, and black on black in a terminal's palette
            self._filters[:] = [one for one in self._filters if not isinstance(one, Monochrome)] + [NoColor()]
        self.failure: BaseException | None = None
        self.keymap = keymap or Keymap()
        self.set_keymap(self.keymap.textual())
        self._settings = settings
        self._leaving = self._asked = False
        self._code = 0
        self.chat_screen = ChatScreen(
            make_chat,
            settings=settings,
            keymap=self.keymap,
            history=history or History(),
            beginning=beginning,
        )

    @property
    def chat(self) -> Chat:
        return self.chat_screen.chat

    @contextmanager
    def suspend(self) -> Iterator[None]:
        """Lend the terminal out; the app comes back also when the borrower fails."""
        failure: BaseException | None = None
        with super().suspend():
            try:
                yield
            except BaseException as error:
                failure = error  # Textual resumes only after a block that ends well
        if failure is not None:
            raise failure

    def get_default_screen(self) -> Screen[Any]:
        return self.chat_screen

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return self._defaults

    def on_mount(self) -> None:
        self._listen_to_signals()
        # back from the shell, the terminal has nothing of what was painted
        self.app_resume_signal.subscribe(self, self._resumed)
        window = self.chat_screen.window
        gallery = self.chat_screen.transcript.gallery
        for lend in (window.pause, gallery.pause):
            self.app_suspend_signal.subscribe(self, lambda _, lend=lend: lend(), immediate=True)
        for problem in self.shelf.problems:
            self.chat_screen.front.note(problem, "warning")
        self.action_look(self._settings["theme"])
        self.call_after_refresh(_rest)

    def _resumed(self, _: App[Any]) -> None:
        self.chat_screen.transcript.gallery.resume()
        self.chat_screen.window.resume()
        self.chat_screen.window.show(self.chat)
        self.refresh(layout=True)

    def action_look(self, name: str) -> None:
        """Apply the theme `name` as its file is now."""
        self.shelf.refresh()
        try:
            theme = self.shelf.find(name).theme
        except QchatError as error:
            self.chat_screen.front.note(str(error), "error")
            return
        self.register_theme(theme)
        if self.theme == theme.name:
            self.refresh_css()  # the file may have changed under the same name
        self.theme = theme.name

    def action_mouse(self, on: bool) -> None:
        """Use the mouse, or leave it to the terminal."""
        driver: Any = self._driver
        if driver is not None and hasattr(driver, "_enable_mouse_support"):
            if not on:
                driver._disable_mouse_support()
            driver._mouse = on
            if on:
                driver._enable_mouse_support()

    async def action_leave(self, to: Goal = "shell") -> None:
        """End the app, and the engine unless another front end goes on with it.

        Ask first if that ends long work. To leave again means yes.
        """
        long = [job for job in self.chat.running_jobs if job.is_long and not job.stopping]
        if to != "shell" or not long or self._asked:
            await self._leave(to)
            return
        self._asked = True
        running = " and ".join(f"{job.method} ({format_age(job.age)} in)" for job in long)
        question = f"Still running: {running}. Stop it and leave? n lets it finish."
        self.push_screen(Confirm(question), partial(self._answered, to))

    async def _answered(self, to: Goal, leaves: bool | None) -> None:
        self._asked = False
        if leaves:
            await self._leave(to)

    async def _leave(self, to: Goal) -> None:
        if self._leaving:
            return
        self._leaving = True
        self.chat_screen.prompt.keep_draft()
        if to == "shell":
            with suppress(TimeoutError):
                await asyncio.wait_for(self.chat.quit(), LEAVE_SECONDS)
        else:
            self.chat.leave_view()
        self.chat_screen.transcript.gallery.close()  # while the terminal still has the app's screen
        self.exit(to, return_code=self._code)

    def _listen_to_signals(self) -> None:
        """Let signals leave as the user would; an interrupt may have been meant for $EDITOR."""
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
            loop.add_signal_handler(signal.SIGINT, self.chat_screen.action_do, "interrupt")
            for number in (signal.SIGTERM, signal.SIGHUP):
                loop.add_signal_handler(number, self._end_by, number)

    def _end_by(self, number: signal.Signals) -> None:
        self._code = 128 + number
        self._ending = asyncio.get_running_loop().create_task(self._leave("shell"))
        # a terminal that is gone may never accept what is still to be written
        watchdog = threading.Timer(LEAVE_SECONDS + 2, os._exit, (128 + number,))
        watchdog.daemon = True
        watchdog.start()

    def _fatal_error(self) -> None:
        """Print no traceback with values of variables; the caller of the app saves one."""
        error = self._exception
        self.failure = error.error if isinstance(error, WorkerFailed) else error
        self.chat_screen.prompt.keep_draft()
        self.chat_screen.transcript.gallery.close()
        self._close_messages_no_wait()


def _rest() -> None:
    """Exempt what is alive after the first paint from garbage collection: it stays."""
    gc.collect()
    gc.freeze()
