"""Show what running a model would take of this machine's memory, and how long its conversations can get."""

import argparse
import json
import sys

from ...text.output import write
from . import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's folder or name")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of context that must fit")
    parser.add_argument("--kv-bits", type=int, choices=(8,), help="keep keys and values at 8 bits")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit code. Raises QchatError, DoesNotFit (4) where it does not."""
    from ....core import plan_folder, plan_table

    plan = plan_folder(model_folder(args.model), context=args.context, kv_bits=args.kv_bits)
    text = json.dumps(plan.as_json(), indent=2) if args.json else plan_table(plan)
    write(sys.stdout, text + "\n")
    return 0
