"""Make an MLX checkpoint of a Qwen3.5 or Qwen3.6 model: quantized by a recipe, or in bfloat16."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ....core.errors import UsageError
from ....core.events import Notice
from ...text.output import note, write
from ...text.statusline import StatusLine
from . import model_folder

BANDWIDTH_GB_S = 400.0
# what only a quantization can use: the flag, and its name in the namespace
NEEDS_Q = {
    "--q-bits": "bits",
    "--q-recipe": "recipe",
    "--recipe-file": "recipe_file",
    "--q-group-size": "group_size",
    "--q-mode": "mode",
    "--q-mxfp": "mxfp",
    "--float-map": "float_map",
    "--keep-bf16": "keep_bf16",
    "--imatrix-path": "imatrix",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_places(parser)
    add_choices(parser)
    plan = parser.add_argument_group("planning")
    plan.add_argument("--plan", action="store_true", help="print what it would give, from config.json alone")
    plan.add_argument("--bandwidth", type=float, metavar="GB/S", help="memory bandwidth to plan with (400)")
    parser.add_argument("--json", action="store_true", help="print the plan or the report as JSON")


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i", "--input", required=True, metavar="MODEL", help="folder or name; raw, FP8 or converted"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="the new folder")


def add_choices(parser: argparse.ArgumentParser) -> None:
    """What decides about the new model, without the places; /convert has the same."""
    parser.add_argument("--force", action="store_true", help="replace an earlier conversion at -o")
    _add_quantization(parser.add_argument_group("quantization"))
    _add_scaling(parser.add_argument_group("importance"))
    _add_parts(parser.add_argument_group("parts of the model"))


def _add_quantization(group: Any) -> None:
    group.add_argument("-q", "--quantize", action="store_true", help="quantize; else bfloat16")
    group.add_argument("--q-bits", dest="bits", type=int, metavar="N", help="the base: 2, 3, 4, 5, 6 or 8")
    group.add_argument(
        "--q-recipe",
        dest="recipe",
        metavar="NAME",
        help="unsloth, qwen3_5, mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6 or none",
    )
    group.add_argument("--recipe-file", metavar="FILE", help="a recipe of your own, in TOML")
    group.add_argument("--q-group-size", dest="group_size", type=int, metavar="N", help="32, 64 or 128")
    group.add_argument("--q-mode", dest="mode", metavar="MODE", help="affine, mxfp4, mxfp8 or nvfp4")
    group.add_argument("--q-mxfp", dest="mxfp", action="store_true", help="4 bits become mxfp4, 8 bits mxfp8")
    group.add_argument(
        "--float-map", action="store_true", help="unsloth's fixed map; with --q-mxfp or --q-mode nvfp4"
    )
    group.add_argument(
        "--keep-bf16", action="store_true", help="leave o_proj, out_proj, in_proj_a and in_proj_b dense"
    )
    group.add_argument("--dequantize", action="store_true", help="of a quantized source: bfloat16")


def _add_scaling(group: Any) -> None:
    group.add_argument(
        "--imatrix-path", dest="imatrix", type=Path, metavar="FILE", help="weigh errors by this imatrix"
    )
    group.add_argument(
        "--awq",
        choices=("off", "fixed", "search"),
        help="scale channels by importance: not, fully, or as far as it helps (search)",
    )


def _add_parts(group: Any) -> None:
    group.add_argument(
        "--mtp", choices=("keep", "drop", "split"), default="keep", help="the draft head; split: own file"
    )
    group.add_argument("--vision", choices=("keep", "drop"), default="keep", help="the vision tower")


def run(args: argparse.Namespace) -> int:
    """Plan or convert; returns the exit code. Raises QchatError."""
    _check(args)
    args.input = model_folder(args.input)
    from ....core import UNQUANTIZED, Options, plan_json, plan_text

    options = Options(**option_fields(args, UNQUANTIZED))
    if not args.plan:
        return _convert(args, options)
    bandwidth = BANDWIDTH_GB_S if args.bandwidth is None else args.bandwidth
    if args.json:
        write(sys.stdout, json.dumps(plan_json(args.input, options, bandwidth), indent=2) + "\n")
    else:
        write(sys.stdout, plan_text(args.input, options, bandwidth) + "\n")
    return 0


def option_fields(args: argparse.Namespace, unquantized: str) -> dict[str, Any]:
    """The fields of `Options`; `unquantized` is the recipe that packs nothing."""
    chosen = {name: value for name in ("bits", "group_size", "mode") if (value := getattr(args, name))}
    return {
        "recipe": args.recipe_file or args.recipe or "none" if args.quantize else unquantized,
        "mxfp": args.mxfp,
        "float_map": args.float_map,
        "keep_bf16": args.keep_bf16,
        "mtp": args.mtp,
        "vision": args.vision,
        **chosen,
    }


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that contradict each other or would change nothing."""
    check_choices(args)
    if args.bandwidth is not None and not args.plan:
        raise UsageError("--bandwidth would change nothing without --plan")
    if args.output is None and not args.plan:
        raise UsageError("-o FOLDER is needed: where the conversion goes")


def check_choices(args: argparse.Namespace) -> None:
    """The same, of what `add_choices` added."""
    if not args.quantize:
        for flag, name in NEEDS_Q.items():
            if getattr(args, name) not in (None, False):
                raise UsageError(f"{flag} would change nothing without -q")
    if args.quantize and args.dequantize:
        raise UsageError("-q and --dequantize contradict each other: give one")
    if args.recipe and args.recipe_file:
        raise UsageError("--q-recipe and --recipe-file both name a recipe: give one")
    if args.recipe_file and not args.recipe_file.endswith(".toml"):
        raise UsageError(f"--recipe-file is {args.recipe_file}, wanted a .toml file")
    if args.awq and args.imatrix is None:
        raise UsageError(f"--awq {args.awq} needs --imatrix-path: the importances come from there")


def _convert(args: argparse.Namespace, options: Any) -> int:
    from ....core import Conversion, convert

    conversion = Conversion(
        source=args.input,
        target=args.output,
        options=options,
        imatrix=args.imatrix,
        awq=args.awq or "search",
        dequantize=args.dequantize,
        force=args.force,
        flags=tuple(flags(args)),
    )
    view = _View()
    try:
        report = convert(conversion, view)
    except KeyboardInterrupt:
        view.say("interrupted: the same command goes on from the last finished shard")
        return 130
    finally:
        view.clear()
    text = json.dumps(report.as_json(), indent=2) if args.json else report.as_text()
    write(sys.stdout, text + "\n")
    return 0


def flags(args: argparse.Namespace) -> list[str]:
    """The choices as words of a command; files by their names alone."""
    words = ["-q"] if args.quantize else []
    words += ["--dequantize"] if args.dequantize else []
    for flag, name in {**NEEDS_Q, "--awq": "awq"}.items():
        value = getattr(args, name)
        if value not in (None, False):
            words += [flag] if value is True else [flag, Path(str(value)).name]
    for name in ("mtp", "vision"):
        words += [f"--{name}", getattr(args, name)] if getattr(args, name) != "keep" else []
    return words


class _View:
    """Warnings as lines on stderr; progress as one line there that replaces itself, on a terminal only."""

    def __init__(self) -> None:
        self._line = StatusLine()

    def __call__(self, event: Any) -> None:
        if isinstance(event, Notice):
            self.say(event.text)
        else:
            self._line.show(progress_line(event))

    def say(self, sentence: str) -> None:
        self.clear()
        note(sentence)

    def clear(self) -> None:
        self._line.clear()


def progress_line(event: Any) -> str:
    """One `Progress` in less than 80 columns."""
    share = event.done / event.total if event.total else 1.0
    left = "" if event.seconds_left is None else f", {_clock(event.seconds_left)} left"
    module = event.module.removeprefix("language_model.").removeprefix("model.")
    return f"{event.stage} {share:4.0%} of {event.total / 10**9:.2f} GB{left}  {module:.36}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
