"""Starts a chat, full-screen or line by line, while the engine starts beside it.

Decides before a terminal library is imported, because those read the environment at import.
"""

import asyncio
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import QchatError, StoreError, UsageError
from ...core.machine.files import MAX_JSON_NBYTES, parse_json_value, read_text
from ...core.quoting import quote_value
from ..chat.client import COMMAND, MOST_RANKS, EngineClient, behind_launcher, shared_command, spawn_early
from ..chat.conversations import describe_other_model, find, model_of, open_store
from ..chat.start import Beginning
from ..chat.turns import last_question
from ..text.output import has_full_terminal, write
from ..text.sanitise import wrap
from ..user.attachments import mention, read, split_pictures, with_files
from ..user.history import History
from ..user.keymap import Keymap
from ..user.paths import state_dir
from ..user.settings import Settings
from .choice import choose_model

if TYPE_CHECKING:
    from ...core import Store
    from ..chat.controller import Chat, View

ANSWER_LINES = 12
HISTORY_FILE = "history"


@dataclass(frozen=True)
class Launch:
    """What the command line asked for; `session` names a conversation or is "latest"."""

    settings: Settings
    model: str | None = None
    text: str = ""
    files: tuple[str, ...] = ()
    session: str | None = None
    stats: bool = False
    yes: bool = False
    ranks: int | None = None
    hostfile: str | None = None


def run(launch: Launch) -> int:
    """Chat until the user quits; return the exit code. Raises QchatError if it cannot start."""
    full = is_full(launch.settings)
    keymap = _keymap(launch.settings, full)
    engine = _engine(launch)
    with ExitStack() as stack:
        store, unsaved = _opened(launch, stack)
        beginning = _beginning(launch, store)
        beginning = replace(beginning, said=beginning.said or unsaved)
        spawn_early(*engine)
        history = History(_history_file())

        def make_chat(view: "View") -> "Chat":
            from ..chat.controller import Chat

            return Chat(
                view,
                lambda: EngineClient(*engine),
                job_client_factory=EngineClient,  # jobs are one process's
                settings=launch.settings,
                store=store,
            )

        runner = stack.enter_context(asyncio.Runner())  # one for all: the engine's pipes are its loop's
        return _converse(_Fronts(launch.settings, keymap, history, runner), make_chat, beginning, full=full)


@dataclass(frozen=True)
class _Fronts:
    """What the front ends of one run have in common."""

    settings: Settings
    keymap: Keymap
    history: History
    runner: asyncio.Runner


def _converse(
    fronts: _Fronts, make_chat: "Callable[[View], Chat]", beginning: Beginning | None, *, full: bool
) -> int:
    """Run one front end after the other, until one of them leaves to the shell; return the exit code."""
    settings, history, runner = fronts.settings, fronts.history, fronts.runner
    while True:
        if full:
            code, chat = _run_app(
                make_chat, settings, fronts.keymap, history, beginning, loop=runner.get_loop()
            )
        else:
            from ..plain.repl import run as run_lines

            code, chat = run_lines(
                make_chat, settings=settings, history=history, beginning=beginning, runner=runner
            )
        if chat is None:
            return code
        make_chat, beginning, full = chat.show_in, None, not full
        settings.change("plain", not full, "/plain")


def _keymap(settings: Settings, full: bool) -> Keymap:
    """Return the keys of the settings; what is wrong with them matters to the full screen alone."""
    try:
        return Keymap.load(settings["keys"], settings.origin("keys"))
    except QchatError:
        if full:
            raise
        return Keymap()


def _opened(launch: Launch, stack: ExitStack) -> "tuple[Store | None, str]":
    """Return the store; where there can be none, a sentence that conversations are not saved.

    Raises QchatError if a stored conversation is wanted.
    """
    try:
        return stack.enter_context(closing(open_store())), ""
    except (UsageError, StoreError) as error:
        if launch.session:
            raise
        return None, f"conversations are not saved in this run: {error}"


def is_full(settings: Settings) -> bool:
    """Tell whether the full screen is wanted and this terminal can show it."""
    return not settings["plain"] and not settings["screen_reader"] and has_full_terminal()


def _engine(launch: Launch) -> tuple[Sequence[str], Mapping[str, str]]:
    """Return the engine's command and its additional environment. Raises UsageError."""
    if launch.ranks is None and launch.hostfile is None:
        return COMMAND, {}
    if launch.ranks is not None and not 2 <= launch.ranks <= MOST_RANKS:
        raise UsageError(f"--ranks is {launch.ranks}, wanted 2 to {MOST_RANKS}")
    if launch.hostfile is not None:
        _check_hostfile(Path(launch.hostfile))
    return shared_command(ranks=launch.ranks, hostfile=launch.hostfile), behind_launcher()


def _check_hostfile(path: Path) -> None:
    """Raise UsageError unless the file names two hosts, this one first; the launcher checks the rest."""
    if not path.is_file():
        raise UsageError(f"--hostfile: there is no file {path}")
    try:
        value = parse_json_value(read_text(path, UsageError, MAX_JSON_NBYTES))
    except ValueError as error:
        raise UsageError(f"--hostfile: {path} cannot be read: {error}") from error
    hosts = value.get("hosts") if isinstance(value, dict) else value
    if not isinstance(hosts, list) or len(hosts) < 2 or not all(isinstance(host, dict) for host in hosts):
        raise UsageError(f"{path} names no two hosts: mlx.distributed_config writes such files")
    if hosts[0].get("ssh") != "127.0.0.1":
        raise UsageError(
            f'{path}: the first host is {quote_value(hosts[0].get("ssh"))}, wanted "127.0.0.1", this machine'
        )


def _beginning(launch: Launch, store: "Store | None") -> Beginning:
    from ...core.hub.library import Locations

    found = find(store, launch.session) if launch.session and store is not None else None
    places = Locations.from_setting(launch.settings["models_dir"])
    folder, said = choose_model(launch.model or model_of(found, places), launch.settings, yes=launch.yes)
    said = describe_other_model(found, folder) or said
    pictures, files = split_pictures(launch.files)
    text = with_files(launch.text, [read(path, Path.cwd()) for path in files])
    text = " ".join([*map(mention, pictures), text]).strip()
    return Beginning(str(folder), found.id if found else None, text, launch.stats, said or "")


def _history_file() -> Path | None:
    try:
        return state_dir() / HISTORY_FILE
    except UsageError:
        return None


def _run_app(
    make_chat: "Callable[[View], Chat]",
    settings: Settings,
    keymap: Keymap,
    history: History,
    beginning: Beginning | None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
) -> "tuple[int, Chat | None]":
    """Run the app; return its exit code, and the chat if the user goes on with it line by line."""
    if os.environ.get("NO_COLOR") == "":  # the toolkit takes an empty one for set
        del os.environ["NO_COLOR"]
    for name in ("COLUMNS", "LINES"):  # it would believe them more than the terminal, which is resized
        os.environ.pop(name, None)
    from ..screens.app import QchatApp

    app = QchatApp(make_chat, settings=settings, keymap=keymap, history=history, beginning=beginning)
    try:
        goal = app.run(mouse=settings["mouse"], loop=loop)
    finally:  # also after a crash
        app.chat_screen.window.close(_to_terminal)
    if app.failure is not None:
        raise app.failure
    if goal == "plain":
        return 0, app.chat
    _say_farewell(app.chat)
    return app.return_code or 0, None


def _to_terminal(sequence: str) -> None:
    """Write an escape sequence of ours to the terminal, if it is still there."""
    with suppress(OSError):
        sys.stderr.write(sequence)
        sys.stderr.flush()


def _say_farewell(chat: "Chat") -> None:
    """Print the last exchange where the full screen was."""
    turns = chat.state.turns
    if not turns:
        return
    answer = turns[-1].answer.strip().splitlines()
    left_out = len(answer) - ANSWER_LINES
    shown = [f"… {left_out:,} lines before", *answer[-ANSWER_LINES:]] if left_out > 0 else answer
    question = " ".join((last_question(turns) or turns[-1]).question.split())
    lines = [f"❯ {question if len(question) <= 200 else question[:199] + '…'}", "", *shown, ""]
    if chat.state.conversation is not None:
        lines.append("qchat -c goes on with this conversation")
    if sys.stdout.isatty():  # a terminal would break them inside words
        width = shutil.get_terminal_size().columns
        lines = [row for line in lines for row in wrap(line.expandtabs(4), width)]
    write(sys.stdout, "\n".join(lines) + "\n")
