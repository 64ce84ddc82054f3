"""The options of the recipe best, which chooses bits under a budget, and its choice in words and a curve."""

import argparse
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from ..text.report import Curve, Lines, Part

if TYPE_CHECKING:
    from ...core.quant.results import AllocationSummary

BEST = "best"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "B": 1}
SIZE = re.compile(rf"(\d+(?:\.\d+)?) *({'|'.join(UNITS)})", re.IGNORECASE)
RATE = re.compile(r"(\d+(?:\.\d+)?) *(?:GB/s)?", re.IGNORECASE)
BUDGET = re.compile(r"(\d+(?:\.\d+)?) *(bpw|tok/s|tokens/s)", re.IGNORECASE)
# the flag, and its name in the namespace
TARGETS = {"--target-size": "target_size", "--target-bpw": "target_bpw", "--target-speed": "target_speed"}


def add_budget(group: Any) -> None:
    group.add_argument("--target-size", metavar="SIZE", help="the most that the weight files take, as 15GB")
    group.add_argument("--target-bpw", type=float, metavar="N", help="the most bits per weight, as 4.2")
    group.add_argument(
        "--target-speed", type=float, metavar="N", help="tokens/s to reach at --bandwidth, or this machine's"
    )
    group.add_argument(
        "--sensitivity",
        metavar="FILE",
        help="how much each matrix matters: measured once if it is missing (beside the model)",
    )


def parse_bandwidth(text: str) -> float:
    """Return GB/s; both 400 and 400GB/s say 400. Raises ArgumentTypeError."""
    match = RATE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a bandwidth, wanted one like 400GB/s")
    return float(match[1])


def budget_flags(text: str) -> list[str]:
    """Return the flags for a budget in one word: 15GB, 4.2bpw or 20tok/s. Raises UsageError."""
    match = BUDGET.fullmatch(text.strip())
    if match is not None:
        return ["--target-bpw" if match[2].lower() == "bpw" else "--target-speed", match[1]]
    if SIZE.fullmatch(text.strip()) is None:
        raise UsageError(f"the budget is {text!r:.40}, wanted one like 15GB, 4.2bpw or 20tok/s")
    return ["--target-size", text.strip()]


def parse_size(text: str) -> int:
    """Return bytes. Raises UsageError."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--target-size is {text!r:.40}, wanted a size like 15GB or 900MiB")
    units = {name.lower(): nbytes for name, nbytes in UNITS.items()}
    return int(float(match[1]) * units[match[2].lower()])


def check_budget(args: argparse.Namespace) -> None:
    """Raise UsageError unless a budget goes with the recipe best, and only with it."""
    given = [flag for flag, name in TARGETS.items() if getattr(args, name) is not None]
    if args.recipe != BEST:
        for flag in (*given, *(["--sensitivity"] if args.sensitivity else [])):
            raise UsageError(f"{flag} would change nothing without --q-recipe best")
        return
    if len(given) != 1:
        many = f"{' and '.join(given)} are given" if given else "none is given"
        raise UsageError(f"--q-recipe best needs one of {', '.join(TARGETS)}: {many}")
    budget_fields(args)


def budget_fields(args: argparse.Namespace) -> dict[str, float] | None:
    """Return the fields of `core.Budget`; None for other recipes. Raises UsageError."""
    if args.recipe != BEST:
        return None
    if args.target_size is not None:
        return {"nbytes": parse_size(args.target_size)}
    if args.target_bpw is not None:
        return {"bits_per_weight": args.target_bpw}
    rate = {} if args.bandwidth is None else {"bandwidth_gb_s": args.bandwidth}
    return {"tokens_per_s": args.target_speed, **rate}


def target_label(args: argparse.Namespace) -> str | None:
    """Return the budget as part of a folder's name."""
    if args.target_size is not None:
        return args.target_size.replace(" ", "")
    if args.target_bpw is not None:
        return f"{args.target_bpw:g}bpw"
    return None if args.target_speed is None else f"{args.target_speed:g}tps"


def kl_text(kl: float) -> str:
    return f"predicted KL divergence {kl:.3g} nats"


def allocation_parts(found: "AllocationSummary") -> tuple[Part, ...]:
    """Draw the curve of KL against size with the chosen point, and say what it rests on."""
    unit, scale = ("GB", 1e9) if found.nbytes >= 10**9 else ("MB", 1e6)
    points = [(point.nbytes / scale, point.kl) for point in found.curve]
    said = (
        f"bits chosen for {found.budget}, {kl_text(found.predicted_kl)}",
        f"sensitivities: {found.sensitivity}, measured over {found.tokens:,} tokens",
    )
    chosen = (found.nbytes / scale, found.predicted_kl)
    return (Curve(points, chosen, unit, "predicted KL (nats)"), Lines(said))


def is_given(value: object) -> bool:
    """Tell whether an option was given."""
    return value not in (None, False)


def budget_words(args: argparse.Namespace) -> Mapping[str, Any]:
    """Return the given options by flag, for the line that repeats a conversion."""
    files = {"--sensitivity": "sensitivity"}
    flags = {**TARGETS, **files, **({} if args.target_speed is None else {"--bandwidth": "bandwidth"})}
    return {flag: getattr(args, name) for flag, name in flags.items() if is_given(getattr(args, name))}
