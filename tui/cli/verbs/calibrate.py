"""Measure on a text which input channels of a model's matrices matter; write them as an imatrix in GGUF."""

import argparse
import sys
from pathlib import Path

from ...text.output import write
from ...text.statusline import StatusLine
from . import model_folder

CHUNK_SIZE = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's folder or name, best the unquantized one")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the new imatrix")
    parser.add_argument("--data", type=Path, metavar="FILE", help="a text of your own instead of qchat's")
    parser.add_argument(
        "--chunk-size",
        type=int,
        default=CHUNK_SIZE,
        metavar="N",
        help=f"tokens read in one go ({CHUNK_SIZE})",
    )
    parser.add_argument("--chunks", type=int, metavar="N", help="read at most so many")


def run(args: argparse.Namespace) -> int:
    """Measure and write; returns the exit code. Raises QchatError."""
    from ....core import calibrate_model

    model, status = model_folder(args.model), StatusLine()

    def progress(done: int, total: int) -> None:
        status.show(f"calibrating: {done:,} of {total:,} chunks of {args.chunk_size:,} tokens")

    try:
        made = calibrate_model(
            model,
            args.output,
            data=args.data,
            chunk_size=args.chunk_size,
            chunks=args.chunks,
            progress=progress,
        )
    finally:
        status.clear()
    if made.resumed:
        write(sys.stderr, f"qchat: went on after chunk {made.resumed:,} of an earlier run\n")
    if made.unreached:
        write(sys.stderr, f"qchat: no token reached {made.unreached:,} of {made.experts:,} experts\n")
    write(sys.stdout, f"{made.path}: {made.modules:,} matrices, {made.chunks:,} chunks\n")
    return 0
