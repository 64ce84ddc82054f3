"""Describe this machine, every form of a model's operations with its error and time, and which one is used.
The output names no folders and no models, so it can be pasted into a bug report."""

import argparse
import json
import sys

from ... import __version__
from ...text.output import note, write
from . import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="embedded",
        help="a model's folder or name (default: embedded)",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; returns the exit code. Raises QchatError."""
    from ....core import diagnose

    found = diagnose(model_folder(args.model), note)
    if args.json:
        write(sys.stdout, json.dumps({"qchat": __version__, **found.as_json()}, indent=2) + "\n")
    else:
        write(sys.stdout, f"qchat {__version__}\n{found.as_text()}\n")
    return 0
