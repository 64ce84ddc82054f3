"""Commands other than chatting: `qchat VERB ...`, one module each, imported only when its verb is used.

A verb's module has `add_arguments(parser)` and `run(args) -> int`; its docstring is its help.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from ....core.errors import UsageError
from ...text.output import write
from ...user.paths import user_path

VERBS = {
    "bench": "measure a model's speed, alone or against other runtimes",
    "calibrate": "measure which inputs matter, for convert's --imatrix-path",
    "card": "rewrite a model folder's card",
    "completion": "print a completion script for bash, zsh or fish",
    "config": "show the settings and where each comes from",
    "convert": "make a quantized model, or plan one",
    "doctor": "show this machine and what runs fastest on it",
    "eval": "measure a model's quality, alone or against another model",
    "help": "show this page, or a command's: qchat help COMMAND",
    "inspect": "show what a model folder holds",
    "models": "list local and published models, or delete a local one",
    "plan": "show the memory that a model needs and the context that fits",
    "pull": "download a model from Hugging Face",
    "sessions": "list, search, export and delete conversations",
}


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help lists the options)")


def model_folder(name: str) -> Path:
    """Return the folder of a model on this machine, by any of its names or its path. Raises ModelError."""
    from ....core.hub.library import Locations, find_model
    from ...user.settings import Settings

    path = user_path(name)
    return path if path.exists() else find_model(name, Locations.from_setting(Settings.load()["models_dir"]))


def closest_verb(word: str) -> str | None:
    """Return the one of VERBS that `word` is most like, or None if it is like none."""
    from ...user.settings import closest

    return closest(word.lower(), VERBS)


def parser_of(verb: str) -> Parser:
    """The parser of one of VERBS."""
    module = import_module(f".{verb}", __name__)
    parser = Parser(prog=f"qchat {verb}", allow_abbrev=False, description=module.__doc__)
    module.add_arguments(parser)
    return parser


def run(verb: str, argv: Sequence[str]) -> int:
    """Run one of VERBS with the words after it; returns the exit code. Raises QchatError."""
    try:
        args = parser_of(verb).parse_args(argv)
    except SystemExit as end:  # --help has printed
        write(sys.stdout, "")
        return int(end.code or 0)
    return import_module(f".{verb}", __name__).run(args)
