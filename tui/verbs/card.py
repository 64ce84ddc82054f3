"""Rewrite the card of a model folder, its README.md, from what the folder holds. Sections that others wrote
stay, and nothing is published."""

import argparse
import sys
from pathlib import Path

from ..output import write
from ..settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder or name")
    parser.add_argument("--print", action="store_true", help="print the card and leave the folder as it is")


def run(args: argparse.Namespace) -> int:
    """Write or print it; returns the exit code. Raises QchatError."""
    from ...core import library, modelcard

    folder = library.find(str(args.model), library.Places.of(Settings.load()["models_dir"]))
    if args.print:
        write(sys.stdout, modelcard.make_card(folder))
    else:
        write(sys.stdout, f"{modelcard.write_card(folder)}\n")
    return 0
