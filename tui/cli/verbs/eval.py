"""Measure how well a model predicts text, and with --reference how far it is from another one: KL divergence,
agreement on the likeliest token, and both perplexities, by kind of text."""

import argparse
import json
import sys
from pathlib import Path

from ...text.output import write
from ...text.statusline import StatusLine
from . import model_folder

CONTEXT = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's folder or name")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the model to compare with, mostly the unquantized one",
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="a text of your own instead of qchat's")
    parser.add_argument(
        "--context", type=int, default=CONTEXT, metavar="N", help=f"tokens read in one go ({CONTEXT})"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the figures; returns the exit code. Raises QchatError."""
    from ....core import evaluate_model

    model, reference = (name and model_folder(name) for name in (args.model, args.reference))
    status = StatusLine()

    def report(doing: str, done: int, total: int) -> None:
        status.show(f"{doing}: {done:,} of {total:,} tokens")

    try:
        evaluation = evaluate_model(model, reference, data=args.data, context=args.context, report=report)
    finally:
        status.clear()
    text = json.dumps(evaluation.as_json(), indent=2) if args.json else evaluation.as_table()
    write(sys.stdout, text + "\n")
    return 0
