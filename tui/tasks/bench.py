"""The task `bench`: the speed of models."""

# ruff: noqa: ARG002  a task need not use all that tasks are given

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from ..text.report import Bar, Bars, Lines, Part, Report, Spark, Table
from ..user.paths import user_path
from .base import Door, EngineTask, JobRequest, add_json, decode
from .progress import Events, gauge, rows

if TYPE_CHECKING:
    from ...core.measuring.results import Bench as Result
    from ...core.measuring.results import BenchResult, PeerFigures

GIB = 1 << 30
RUNS, MAX_RUNS = 3, 100
VARIANT = "UD-Q4_K_XL"
PEERS = ("mlx-lm",)


class Bench(EngineTask["Result"]):
    """Measure the speed of models, alone or against mlx-lm.

    Reports the capitals conversation (the best of turns 2 to 4, the median of the runs), a sustained reply,
    prefill, time to first token, memory, and the share of the memory bandwidth that decoding uses. The
    figures are kept and shown beside the model's name. In a chat MODEL is the loaded model by default.
    """

    name = "bench"
    usage = "[MODEL ...] [OPTIONS]"
    memory = "all"
    most_models = 100

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("models", nargs="*", metavar="MODEL", help="a model's folder or name")
        parser.add_argument(
            "--random", metavar="CONFIG", help="also a model with this config.json and random weights"
        )
        parser.add_argument(
            "--variant", default=VARIANT, metavar="NAME", help=f"how its weights are packed ({VARIANT})"
        )
        parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"repeat each part ({RUNS})")
        parser.add_argument("--against", choices=PEERS, help="also run mlx-lm, which must be installed")
        add_json(parser)

    def check(self, args: argparse.Namespace, door: Door) -> None:
        if not 1 <= args.runs <= MAX_RUNS:
            raise UsageError(f"--runs is {args.runs}, wanted 1 to {MAX_RUNS}")
        if not args.random and args.variant != VARIANT:
            raise UsageError("--variant would change nothing without --random")
        if not args.models and not args.random and not door.in_chat:
            raise self.wrong("say which models to measure, or --random CONFIG", door)

    def models(self, args: argparse.Namespace) -> Sequence[str]:
        return args.models or (() if args.random else ("",))

    def request(self, args: argparse.Namespace, folders: Sequence[Path], door: Door) -> JobRequest:
        from ...core.measuring.results import Bench

        params: dict[str, Any] = {"models": [str(folder) for folder in folders], "runs": args.runs}
        if args.random:
            params |= {"random": str(user_path(args.random)), "variant": args.variant}
        if args.against:
            params["against"] = args.against
        names = [*([f"random {args.variant}"] if args.random else []), *(folder.name for folder in folders)]
        return JobRequest(f"bench {', '.join(names)}", "bench", params, Bench)

    def running(self, events: Events) -> Report:
        from ...core.measuring.results import BenchResult

        done = [decode(row, BenchResult) for row in rows(events)]
        return Report("", (*(_parts(done) if done else ()), *gauge(events)))

    def report(self, result: "Result") -> Report:
        return Report("", _parts(result.rows))

    def json_value(self, value: Any) -> Any:
        return [{k: v for k, v in row.items() if k not in ("event", "place")} for row in value["rows"]]


def _parts(results: Sequence["BenchResult"]) -> tuple[Part, ...]:
    bars = [
        Bar(row.model, row.decode_tokens_per_s, f"{row.decode_tokens_per_s:,.1f} tok/s") for row in results
    ]
    sparks = [Spark(row.speeds, f"{row.model}: tok/s over one reply") for row in results if row.speeds]
    speeds = ("model", "capitals tok/s", "sustained tok/s", "prefill tok/s", "bandwidth")
    costs = ("model", "first token s", "cached s", "load s", "peak GiB")
    return (
        Bars(bars),
        *sparks,
        Table(speeds, [row for result in results for row in _speeds(result)], "<>>>>"),
        Table(costs, [row for result in results for row in _costs(result)], "<>>>>"),
        *_prefills(results),
    )


def _speeds(result: "BenchResult") -> list[tuple[str, ...]]:
    own = (
        result.model,
        _figure(result.capitals_tokens_per_s, ",.1f"),
        f"{result.decode_tokens_per_s:,.1f}",
        f"{result.prefill_tokens_per_s:,.0f}",
        f"{result.bandwidth_share:.0%}" if result.bandwidth else "-",
    )
    return [own, *(_peer_speeds(result, result.against) if result.against else ())]


def _peer_speeds(result: "BenchResult", peer: "PeerFigures") -> list[tuple[str, ...]]:
    """Return mlx-lm's speeds, and how many times as fast ours are."""
    decode, prefill = peer.decode_tokens_per_s, peer.prefill_tokens_per_s
    times = [
        f"x{ours / theirs:.1f}" if theirs else "-"
        for ours, theirs in ((result.decode_tokens_per_s, decode), (result.prefill_tokens_per_s, prefill))
    ]
    return [("  mlx-lm", "", f"{decode:,.1f}", f"{prefill:,.0f}", ""), ("  as fast", "", *times, "")]


def _costs(result: "BenchResult") -> list[tuple[str, ...]]:
    own = (
        result.model,
        _figure(result.first_token_seconds, ".2f"),
        _figure(result.cached_first_token_seconds, ".2f"),
        f"{result.load_seconds:.1f}",
        f"{result.peak_nbytes / GIB:,.2f}",
    )
    peer = result.against
    return [own, *([("  mlx-lm", "", "", "", f"{peer.peak_nbytes / GIB:,.2f}")] if peer else [])]


def _prefills(results: Sequence["BenchResult"]) -> tuple[Part, ...]:
    """Return the prefill speeds of several lengths, where more than one was measured."""
    said = []
    for result in results:
        speeds = [(length, speed) for length, speed in result.prefills.items() if speed is not None]
        if len(speeds) > 1:
            read = ", ".join(f"{length:,} at {speed:,.0f} tok/s" for length, speed in speeds)
            said.append(f"{result.model}: prompts of {read}")
    return (Lines(said, "dim"),) if said else ()


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.1f} tok/s"


TASK = Bench()
