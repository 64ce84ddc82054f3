"""Show how qchat or one of its commands is used; the same text as --help."""

import argparse
import sys

from ....core.errors import UsageError
from ...text.output import write
from . import VERBS, closest_verb, parser_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "command",
        nargs="?",
        type=_verb,
        choices=tuple(VERBS),
        metavar="COMMAND",
        help="one of the commands that `qchat help` lists",
    )


def run(args: argparse.Namespace) -> int:
    """Print the help page; returns the exit code."""
    from ..arguments import parser

    shown = parser_of(args.command) if args.command else parser()
    write(sys.stdout, shown.format_help())
    return 0


def _verb(word: str) -> str:
    if word in VERBS:
        return word
    near = closest_verb(word)
    hint = f"did you mean `qchat help {near}`?" if near else f"the commands are {', '.join(VERBS)}"
    raise UsageError(f"there is no command {word:.60}; {hint}")
