"""Show what a model folder holds: each class of tensors, or every tensor, with its code, shape and bytes, and
what the loader had to interpret."""

import argparse
import json
import sys

from ...text.output import write
from . import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's folder or name")
    parser.add_argument("--tensors", action="store_true", help="list every tensor instead of the classes")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit code. Raises QchatError."""
    from ....core import inspect_model

    inspection = inspect_model(model_folder(args.model))
    if args.json:
        write(sys.stdout, json.dumps(inspection.as_json(tensors=args.tensors), indent=2) + "\n")
    else:
        write(sys.stdout, inspection.as_text(tensors=args.tensors) + "\n")
    return 0
