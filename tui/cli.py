"""The `qchat` command: reads its arguments, runs one prompt; a failure ends in a sentence and a code.

Exit codes: 0 done (also when the reader of a pipe leaves early), 1 generation failed, 2 usage,
3 model missing or unsupported, 4 does not fit, 130 interrupted. Imports what is heavy only when it is used.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ..core import EMBEDDED_MODEL
from ..core.errors import DoesNotFit, QchatError, UsageError
from . import __version__
from .output import OutputError, write
from .verbs import VERBS, Parser
from .verbs import run as run_verb

MAX_STDIN_NBYTES = 64 << 20
EFFORTS = ("none", "low", "medium", "high", "xhigh")


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
    if argv and argv[0] in VERBS:
        return run_verb(argv[0], argv[1:])
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # --help and --version have printed
        write(sys.stdout, "")
        return int(end.code or 0)
    model = args.model or str(EMBEDDED_MODEL)
    if args.prompt is None and sys.stdin.isatty() and sys.stdout.isatty():
        return _chat(model, args)
    text = _prompt(args.prompt)
    from .oneshot import Request, run

    return run(
        Request(
            model=model,
            text=text,
            form=args.form,
            show_thinking=args.show_thinking,
            stats=args.stats,
            settings=_settings(args),
        )
    )


def _chat(model: str, args: argparse.Namespace) -> int:
    if args.form != "text":
        raise UsageError("--json and --jsonl print one reply: give the prompt with -p TEXT or pipe it in")
    from .repl import run

    return run(model, _settings(args), show_thinking=args.show_thinking, stats=args.stats)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qchat",
        allow_abbrev=False,
        description="Chat with a Qwen3.5 or Qwen3.6 model on this machine.",
        epilog="Text piped in comes before the prompt. The answer goes to stdout, all else to stderr. "
        f"Other commands: {', '.join(f'qchat {verb} ({what})' for verb, what in VERBS.items())}.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a model folder (by default the small model in the package)"
    )
    parser.add_argument("-p", "--prompt", type=_text, metavar="TEXT", help="what to say to the model")
    parser.add_argument("--version", action="version", version=f"qchat {__version__}")
    _add_output(parser.add_argument_group("output"))
    _add_settings(parser.add_argument_group("reply"))
    _add_sampling(parser.add_argument_group("sampling", "by default as the model's authors recommend"))
    return parser


def _add_output(group: Any) -> None:
    form = group.add_mutually_exclusive_group()
    form.set_defaults(form="text")
    form.add_argument(
        "--json",
        dest="form",
        action="store_const",
        const="json",
        help="print one JSON object: text, thinking, usage, timings, finish_reason, model",
    )
    form.add_argument(
        "--jsonl", dest="form", action="store_const", const="jsonl", help="print each event as a line of JSON"
    )
    group.add_argument("--show-thinking", action="store_true", help="print the model's thoughts to stderr")
    group.add_argument("--stats", action="store_true", help="print token counts and speeds to stderr")


# every option below is named in the namespace as the session names the setting
def _add_settings(group: Any) -> None:
    group.add_argument("--system", type=_text, metavar="TEXT", help="the system prompt")
    group.add_argument(
        "--think",
        dest="enable_thinking",
        action=argparse.BooleanOptionalAction,
        help="have the model think before it answers, or not",
    )
    group.add_argument(
        "--effort",
        dest="reasoning_effort",
        choices=EFFORTS,
        help="how much to think; none and low: not at all",
    )
    group.add_argument(
        "--thinking-budget",
        dest="thinking_token_budget",
        type=int,
        metavar="N",
        help="end the thought after N tokens",
    )
    group.add_argument(
        "--max-tokens",
        dest="max_new_tokens",
        type=int,
        metavar="N",
        help="end the reply after N tokens (2048)",
    )
    group.add_argument(
        "--stop",
        action="append",
        type=_text,
        metavar="TEXT",
        help="end the reply before TEXT; may be repeated",
    )


def _add_sampling(group: Any) -> None:
    for name, kind, meaning in (
        ("temperature", float, "0 takes the most likely token"),
        ("top-p", float, "keep the likeliest tokens up to this probability in all"),
        ("top-k", int, "keep this many tokens; 0 keeps all"),
        ("min-p", float, "keep tokens at least this likely relative to the likeliest"),
        ("repetition-penalty", float, "divide the logits of generated tokens; 1 is none"),
        ("presence-penalty", float, "subtract from the logits of generated tokens"),
        ("frequency-penalty", float, "subtract for each time a token was generated"),
        ("seed", int, "equal seeds give equal replies"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=meaning)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    own = {"model", "prompt", "form", "show_thinking", "stats"}
    return {name: value for name, value in vars(args).items() if name not in own and value is not None}


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not valid UTF-8") from None
    return value


def _prompt(given: str | None) -> str:
    """What was piped in, then what was given. Raises UsageError where both are missing."""
    waiting = sys.stdin.isatty()
    if waiting and given is None:
        raise UsageError("-p TEXT is needed: for now qchat answers one prompt at a time")
    parts = ["" if waiting else _piped(), given or ""]
    text = "\n\n".join(part for part in parts if part)
    if not text.strip():
        raise UsageError("the prompt is empty: give it with -p TEXT or pipe it in")
    return text


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
    """A stream closed by the caller reads nothing and writes nowhere.

    Its number would go to the next file opened, and MLX takes a file with number 0 for one that failed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  open as long as the process


def _never_fail_to_encode(stream: TextIO) -> None:
    """A locale without some character shows a question mark in its place."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _abandon(stream: TextIO) -> None:
    """Send what is still buffered nowhere, or the interpreter complains about it when it ends."""
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
    """The one place that catches everything: no traceback on the screen, all of it in a file."""
    from . import crash

    return _say(f"an internal error ended this run ({type(error).__name__}); {crash.save(error)}", 1)


def _say(sentence: str, code: int) -> int:
    from .output import printable

    try:
        write(sys.stderr, f"qchat: {printable(sentence)}\n")
    except (OSError, OutputError):
        _abandon(sys.stderr)
    return code
