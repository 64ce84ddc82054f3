"""Measure how fast models run here: the capitals conversation (the best of turns 2 to 4, the median of the
runs), a sustained reply, reading prompts, waiting for the first token, memory, and the share of the memory's
bandwidth. What is measured is kept and shown beside the model's name."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.errors import QchatError, UsageError
from ...text.columns import columns
from ...text.output import note, write
from ...text.statusline import StatusLine
from . import model_folder

if TYPE_CHECKING:
    from ....core import BenchRun

GIB = 1 << 30
RUNS = 3
PEERS = ("mlx-lm",)
PEER_PROMPT, PEER_TOKENS = 512, 128
PEER_SECONDS = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a model's folder or name")
    parser.add_argument(
        "--random", type=Path, metavar="CONFIG", help="also a model with this config.json and random weights"
    )
    parser.add_argument(
        "--variant", default="UD-Q4_K_XL", metavar="NAME", help="how those are packed (UD-Q4_K_XL)"
    )
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"repeat each part ({RUNS})")
    parser.add_argument("--against", choices=PEERS, help="also run this one, which must be installed")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Print a row for each model; returns the exit code. Raises QchatError."""
    if args.runs < 1:
        raise UsageError(f"--runs is {args.runs}, wanted 1 or more")
    folders = [model_folder(name) for name in args.models]
    if not folders and args.random is None:
        raise UsageError("say which models to measure, or --random CONFIG")
    rows = [] if args.random is None else [measured_random(args.random, args.variant, args.runs)]
    for folder in folders:
        row = measured(folder, args.runs)
        rows.append(row | ({"against": against_mlx_lm(folder, args.runs)} if args.against else {}))
    text = json.dumps(rows, indent=2) if args.json else table(rows)
    write(sys.stdout, text.rstrip("\n") + "\n")
    return 0


def measured_random(config: Path, variant: str, runs: int) -> dict[str, Any]:
    """The figures of a model that does not exist, of any size that fits."""
    from ....core import load_config, measure_random

    return _followed(measure_random(load_config(config), variant, runs), variant)


def _followed(run: "BenchRun", name: str) -> dict[str, Any]:
    status = StatusLine()
    try:
        while True:
            step = next(run)
            status.show(f"{name}: {step.detail} ({step.done} of {step.total})")
    except StopIteration as end:
        return end.value.as_json()
    finally:
        status.clear()


def measured(folder: Path, runs: int) -> dict[str, Any]:
    """The figures of one model, kept for other runs to show."""
    from ....core import Measurements, measure
    from ...user.paths import measurements_file

    figures = _followed(measure(folder, runs), folder.name)
    try:
        Measurements(measurements_file()).add(folder, figures)
    except (QchatError, OSError) as error:
        note(str(error))
    return figures


def against_mlx_lm(folder: Path, runs: int) -> dict[str, Any]:
    """mlx-lm's own benchmark of the same folder in a process of its own: tokens/s and GB at peak.

    Raises UsageError where it is not installed or fails.
    """
    command = [sys.executable, "-m", "mlx_lm", "benchmark", "--model", str(folder)]
    command += ["-p", str(PEER_PROMPT), "-g", str(PEER_TOKENS), "-n", str(runs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS)
    except subprocess.TimeoutExpired:
        raise UsageError(f"mlx-lm did not end within {PEER_SECONDS} seconds on {folder}") from None
    averages = dict(re.findall(r"(\w+)=([\d.]+)", done.stdout.rpartition("Averages:")[2]))
    if done.returncode or not {"prompt_tps", "generation_tps"} <= averages.keys():
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UsageError(f"mlx-lm's benchmark failed on {folder}: {last}")
    return {
        "prefill_tokens_per_s": float(averages["prompt_tps"]),
        "decode_tokens_per_s": float(averages["generation_tps"]),
        "peak_nbytes": int(float(averages.get("peak_memory", 0)) * 10**9),
    }


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model, the peer's below it."""
    head = ("model", "capitals", "sustained", "prefill", "first", "cached", "load", "peak GiB", "bandwidth")
    lines = [head, ("", "tok/s", "tok/s", "tok/s", "s", "s", "s", "", "")]
    for row in rows:
        lines.append(
            (
                row["model"],
                _figure(row["capitals_tokens_per_s"], ",.1f"),
                f"{row['decode_tokens_per_s']:,.1f}",
                f"{row['prefill_tokens_per_s']:,.0f}",
                _figure(row["first_token_seconds"], ".2f"),
                _figure(row["cached_first_token_seconds"], ".2f"),
                f"{row['load_seconds']:.1f}",
                f"{row['peak_nbytes'] / GIB:.2f}",
                f"{row['bandwidth_share']:.0%}",
            )
        )
        if peer := row.get("against"):
            ratio = row["decode_tokens_per_s"] / peer["decode_tokens_per_s"]
            read = row["prefill_tokens_per_s"] / peer["prefill_tokens_per_s"]
            lines.append(
                (
                    "  mlx-lm",
                    "",
                    f"{peer['decode_tokens_per_s']:,.1f}",
                    f"{peer['prefill_tokens_per_s']:,.0f}",
                    *("",) * 3,
                    f"{peer['peak_nbytes'] / GIB:.2f}",
                    f"x{ratio:.1f}, x{read:.1f}",
                )
            )
    lengths = [
        f"{row['model']}: {', '.join(f'{length} at {speed:,.0f} tok/s' for length, speed in read.items())}"
        for row in rows
        if len(read := {k: v for k, v in row["prefills"].items() if v is not None}) > 1
    ]
    return "\n".join([columns(lines, right=tuple(range(1, len(head)))), *lengths])
