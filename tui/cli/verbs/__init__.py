"""Commands other than chatting: `qchat VERB ...`. Most are tasks, which the chat has too (`tui/tasks/`).

Each of the others is a module here, imported only when it is used, with `add_arguments(parser)` and
`run(args) -> int`; its docstring is its help.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ...tasks import TASKS, load_task
from ...tasks.parsers import Parser
from ...text.output import write

MODULES = {
    "card": "rewrite a model folder's card",
    "completion": "print a completion script for bash, zsh or fish",
    "config": "show the settings and their origins, get or set one",
    "doctor": "show this machine and what runs fastest on it",
    "help": "show this page, or a command's: qchat help COMMAND",
    "launch": "run a coding agent with a local model",
    "pull": "download a model from Hugging Face",
    "serve": "serve a model to other programs over HTTP",
}
VERBS = dict(
    sorted(
        [
            *MODULES.items(),
            *((name, help_[0].lower() + help_[1:].rstrip(".")) for name, help_ in TASKS.items()),
        ]
    )
)


def model_folder(name: str) -> Path:
    """Return the folder of a model on this machine, by any of its names or its path. Raises ModelError."""
    from ...tasks.base import Door
    from ...user.settings import Settings
    from ..run_task import PREFIX, find_folder

    return find_folder(name, Door(PREFIX, Settings.load()["models_dir"]))


def closest_verb(word: str) -> str | None:
    """Return the one of VERBS that `word` is most like, or None if it is like none."""
    from ...user.settings import closest

    return closest(word.lower(), VERBS)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser of one of VERBS."""
    if verb in TASKS:
        return load_task(verb).parser("qchat ")
    module = import_module(f".{verb}", __name__)
    parser = Parser(prog=f"qchat {verb}", allow_abbrev=False, description=module.__doc__)
    module.add_arguments(parser)
    return parser


def run(verb: str, argv: Sequence[str]) -> int:
    """Run one of VERBS with the words after it; returns the exit code. Raises QchatError."""
    if verb in TASKS:
        from ..run_task import run as run_task

        return run_task(verb, argv)
    try:
        args = parser_of(verb).parse_args(argv)
    except SystemExit as end:  # --help has printed
        write(sys.stdout, "")
        return int(end.code or 0)
    return import_module(f".{verb}", __name__).run(args)
