"""The `qchat` command: reads arguments, runs a verb, a chat or one prompt; errors end in a sentence.

Exit codes: 0 done (also when the reader of a pipe leaves early), 1 generation failed, 2 usage,
3 model missing or unsupported, 4 does not fit, 130 interrupted. Imports what is heavy only when it is used.
"""

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ...core import follows, is_rank
from ...core.errors import DoesNotFit, QchatError, UsageError
from ..text.output import OutputError, note, write
from ..user.attachments import split_pictures
from .verbs import VERBS, closest_verb
from .verbs import run as run_verb

if TYPE_CHECKING:
    from ..user.settings import Settings
    from .oneshot_tools import OneShotTools

MAX_STDIN_NBYTES = 64 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's own; returns its exit code."""
    try:
        _open_what_is_closed()
        for stream in (sys.stdout, sys.stderr):
            _never_fail_to_encode(stream)
        return _run(sys.argv[1:] if argv is None else argv)
    except (QchatError, MemoryError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _abandon(sys.stdout)
        return 0
    except Exception as error:
        return _internal_error(error)


def _run(argv: Sequence[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line that is being typed may continue
        from .completers import complete

        complete()
    if follows():
        from ...core import flushing, follow

        if not {"--help", "-h", "--version"} & set(argv):
            with flushing():
                follow()
        return 0
    if argv and argv[0] in VERBS:
        return run_verb(argv[0], argv[1:])
    if argv:
        _refuse_mistyped_verb(argv[0])
    from .arguments import parser

    try:
        args = parser().parse_intermixed_args(argv)
    except SystemExit as end:  # --help and --version have printed
        write(sys.stdout, "")
        return int(end.code or 0)
    if args.words and args.prompt is not None:
        raise UsageError("the prompt was given twice: with -p and as words after MODEL")
    settings = _settings(args)
    if _is_chat(args):
        return _chat(args, settings)
    from ...core import flushing

    with flushing():
        return _answer(args, settings)


def _refuse_mistyped_verb(word: str) -> None:
    """Raises UsageError for a word that resembles a verb and names neither a path nor a model."""
    if word.startswith("-") or "/" in word:
        return
    near = closest_verb(word)
    if near is None:
        return
    from .choice import is_path_or_model

    if not is_path_or_model(word):
        raise UsageError(f"{word:.60} is neither a command nor a model; did you mean `qchat {near}`?")


def _settings(args: argparse.Namespace) -> "Settings":
    from ..user.settings import KEYS, Settings

    flags = {name: value for name, value in vars(args).items() if name in KEYS and name != "model"}
    settings = Settings.load(flags, options=args.options, persona=_persona(args.persona))
    if args.model:
        settings.change("model", args.model, "the command line")
    return settings


def _persona(name: str | None) -> "tuple[str, Mapping[str, Any]] | None":
    if not name:
        return None
    from ..user.personas import read_persona

    return name, read_persona(name)


def _is_chat(args: argparse.Namespace) -> bool:
    """Tell whether to chat: at a terminal without a prompt, or line by line from a pipe if asked to."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    return args.prompt is None and bool(at_terminal or args.plain or args.screen_reader)


def _chat(args: argparse.Namespace, settings: "Settings") -> int:
    if args.form != "text" or args.extract is not None:
        raise UsageError("--json, --jsonl and -x print one reply: give the prompt with -p TEXT or pipe it in")
    if args.yes_tools:
        raise UsageError("--yes-tools is for one prompt: in a chat you are asked")
    from .launch import Launch, run

    return run(
        Launch(
            settings=settings,
            model=args.model,
            text=" ".join(args.words),
            files=tuple(args.files or ()),
            session=args.session,
            stats=args.stats,
            yes=args.yes,
            ranks=args.ranks,
            hostfile=args.hostfile,
        )
    )


def _answer(args: argparse.Namespace, settings: "Settings") -> int:
    if args.ranks is not None or args.hostfile is not None:
        raise UsageError("--ranks and --hostfile are a chat's: mlx.launch -n N -- qchat MODEL -p TEXT")
    if args.extract is not None and settings["schema"] is not None:
        raise UsageError("-x wants a code block and --schema nothing but JSON: leave one of them out")
    pictures, files = split_pictures(args.files or ())
    text = _prompt(" ".join(args.words) or args.prompt, files, empty=bool(pictures))
    from .oneshot import Request, run

    request = Request(
        model="",
        text=text,
        pictures=pictures,
        form=args.form,
        extract=args.extract,
        show_thinking=settings["show_thinking"],
        stats=args.stats,
        quiet=args.quiet,
        settings=settings.session() | settings.reply(),
        tools=_tools(args, settings),
    )
    if args.session is None:
        return run(replace(request, model=_model(args, settings)))
    from ...core.hub.library import Locations
    from ..chat.conversations import describe_other_model, find, model_of, open_store

    with open_store() as store:
        found = find(store, args.session)
        model = _model(args, settings, model_of(found, Locations.from_setting(settings["models_dir"])))
        if (other := describe_other_model(found, Path(model))) and not args.quiet:
            note(other)
        return run(replace(request, model=model, store=store, conversation=found.id))


def _tools(args: argparse.Namespace, settings: "Settings") -> "OneShotTools | None":
    """Return the tools of the answer; None if there are none, which costs no import."""
    from ..user.paths import SERVERS_FILE

    if not (args.yes_tools or settings["tools"] or settings["servers"] or Path(SERVERS_FILE).exists()):
        return None
    from .oneshot_tools import OneShotTools

    return OneShotTools(settings, args.yes_tools, quiet=args.quiet)


def _model(args: argparse.Namespace, settings: "Settings", last: str | None = None) -> str:
    """Return the folder of the named model, else of `last`, else the default one."""
    from .choice import choose_model

    folder, said = choose_model(args.model or last, settings, yes=args.yes)
    if said and not args.quiet:
        note(said)
    return str(folder)


def _prompt(given: str | None, files: Sequence[str], *, empty: bool = False) -> str:
    """Join the text piped in, the files, and the prompt. Raises UsageError if all are missing.

    Beside pictures the text may be `empty`.
    """
    # mlx.launch gives its processes a stdin that never ends
    waiting = sys.stdin.isatty() or is_rank()
    if waiting and given is None and not files and not empty:
        raise UsageError("-p TEXT is needed where the output is no terminal")
    parts = ["" if waiting else _piped(), *_attached(files), given or ""]
    text = "\n\n".join(part for part in parts if part)
    if not text.strip() and not empty:
        raise UsageError("the prompt is empty: give it with -p TEXT or pipe it in")
    return text


def _attached(files: Sequence[str]) -> list[str]:
    if not files:
        return []
    from ..user.attachments import read, with_files

    return [with_files("", [read(path, Path.cwd()) for path in files]).lstrip()]


def _piped() -> str:
    data = sys.stdin.buffer.read(MAX_STDIN_NBYTES + 1)
    if len(data) > MAX_STDIN_NBYTES:
        raise UsageError(f"more than {MAX_STDIN_NBYTES >> 20} MiB were piped in, which no context holds")
    try:
        return data.decode().rstrip("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the text piped in is not UTF-8: byte {error.start} is {data[error.start]:#x}"
        ) from error


def _open_what_is_closed() -> None:
    """Open /dev/null in place of streams that the caller closed.

    Else the next file opened would get the number, and MLX takes a file with number 0 for one that failed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  open as long as the process


def _never_fail_to_encode(stream: TextIO) -> None:
    """Show a question mark for a character that the locale lacks."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _abandon(stream: TextIO) -> None:
    """Discard what is still buffered, or the interpreter complains about it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _refuse(error: QchatError | MemoryError) -> int:
    if isinstance(error, OutputError):
        _abandon(sys.stdout)
    if isinstance(error, MemoryError):
        error = DoesNotFit("the machine ran out of memory")
    return _say(str(error), error.exit_code)


def _internal_error(error: Exception) -> int:
    """Write the traceback to a file, never to the screen."""
    from . import crash

    return _say(f"an internal error ended this run ({type(error).__name__}); {crash.save(error)}", 1)


def _say(sentence: str, code: int) -> int:
    try:
        note(sentence)
    except (OSError, OutputError):
        _abandon(sys.stderr)
    return code
