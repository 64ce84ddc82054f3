"""Rewrite the card of a model folder, its README.md, from what the folder holds and what `qchat eval`
measured of it. Sections that others wrote are kept, and nothing is published."""

import argparse
import sys

from ...text.output import write
from ...user.paths import measurements_file
from . import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's folder or name")
    parser.add_argument("--print", action="store_true", help="print the card and leave the folder as it is")


def run(args: argparse.Namespace) -> int:
    """Write or print the card; return the exit code. Raises QchatError."""
    from ....core import Measurements
    from ....core.conversion import card

    folder = model_folder(args.model)
    figures = Measurements(measurements_file()).find(folder)
    if args.print:
        write(sys.stdout, card.render_folder_card(folder, figures))
    else:
        write(sys.stdout, f"{card.write_folder_card(folder, figures)}\n")
    return 0
