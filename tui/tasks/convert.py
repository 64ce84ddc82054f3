"""The task `convert`: models made, or planned."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core import BUILT_IN_MODEL
from ...core.errors import UsageError
from ..text.report import Bar, Bars, Lines, Part, Report, Table
from ..user.paths import user_path
from .base import Door, EngineTask, JobRequest, add_json, optional_path
from .budget import (
    BEST,
    add_budget,
    allocation_parts,
    budget_fields,
    budget_words,
    check_budget,
    is_given,
    kl_text,
    parse_bandwidth,
    target_label,
)
from .progress import format_seconds
from .variants import plot_variants
from .words import words

if TYPE_CHECKING:
    from ...core.conversion.results import Check, ConversionResult
    from ...core.quant.results import AllocationSummary, PlannedClass, PlanSummary
    from .variants import Variant

GB, MB, GIB = 10**9, 10**6, 1 << 30
# what `core.UNQUANTIZED` is, which cannot be imported here without MLX
UNQUANTIZED = str(BUILT_IN_MODEL.parent / "quant" / "builtin" / "dense.toml")
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
    "--rounding": "rounding",
    "--calibration": "calibration",
    "--imatrix-path": "imatrix",
}
# in a chat, without any flag that says how the weights are stored
CHAT_FLAGS = ("-q", "--q-bits", "4")
STORING = {*NEEDS_Q, "-q", "--quantize", "--dequantize", "--awq"}


class Convert(EngineTask["ConversionResult | PlanSummary"]):
    """Make a quantized model of MODEL in FOLDER, or plan one.

    MODEL is quantized by a recipe, or stored in bfloat16; --plan predicts the result from config.json alone.
    For example: convert embedded -o small -q --q-bits 2 --q-recipe unsloth. A stopped run resumes. In a chat
    FOLDER is in the models folder by default, and weights get 4 bits (-q --q-bits 4) unless a flag says how
    to store them. Without any word the app opens a form for the loaded model.
    """

    name = "convert"
    screen = "convert"
    usage = "MODEL [FOLDER] [OPTIONS]"
    interrupted = "the same command goes on from the last finished shard"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_places(parser)
        _add_quantization(parser.add_argument_group("quantization"))
        add_budget(parser.add_argument_group("budget of the recipe best"))
        _add_rounding(parser.add_argument_group("rounding"))
        _add_scaling(parser.add_argument_group("importance"))
        parser.add_argument_group("text").add_argument(
            "--calibration",
            metavar="FILE",
            help="a text of your own for --q-recipe best and --rounding gptq, instead of qchat's",
        )
        _add_parts(parser.add_argument_group("parts of the model"))
        plan = parser.add_argument_group("planning")
        plan.add_argument(
            "--plan", action="store_true", help="show what it would give, from config.json alone"
        )
        plan.add_argument(
            "--bandwidth",
            type=parse_bandwidth,
            metavar="GB/S",
            help="memory bandwidth to plan with (400), or for --target-speed (this machine's)",
        )
        add_json(parser)

    def chat_words(self, argument: str) -> list[str]:
        given = words(argument)
        stored = any(word.partition("=")[0] in STORING for word in given)
        return given if stored or not given else [*given, *CHAT_FLAGS]

    def check(self, args: argparse.Namespace, door: Door) -> None:
        args.source = _one_of(args.source, args.input, "MODEL", "-i")
        args.target = _one_of(args.target, args.output, "FOLDER", "-o")
        if not args.source:
            raise self.wrong("say which model to convert", door)
        args.quantize = args.quantize or args.recipe == BEST
        _check_choices(args)
        if args.bandwidth is not None and not args.plan and args.target_speed is None:
            raise UsageError("--bandwidth would change nothing without --plan or --target-speed")
        if not args.target and not args.plan and not door.in_chat:
            raise UsageError("-o FOLDER is needed: where the conversion goes")

    def models(self, args: argparse.Namespace) -> Sequence[str]:
        return (args.source,)

    def request(self, args: argparse.Namespace, folders: Sequence[Path], door: Door) -> JobRequest:
        (source,) = folders
        params: dict[str, Any] = {
            "source": str(source),
            "options": option_fields(args),
            "budget": budget_fields(args),
            "sensitivity": optional_path(args.sensitivity),
            "calibration": optional_path(args.calibration),
        }
        if args.plan:
            from ...core.quant.results import PlanSummary

            plan = params | {"bandwidth": args.bandwidth}
            return JobRequest(f"plan converting {source.name}", "plan", plan, PlanSummary)
        from ...core.conversion.results import ConversionResult

        target = user_path(args.target) if args.target else _default_target(source, args, door)
        params |= {
            "target": str(target),
            "imatrix": optional_path(args.imatrix),
            "awq": args.awq,
            "rounding": args.rounding,
            "dequantize": args.dequantize,
            "force": args.force,
            "flags": flags(args),
        }
        return JobRequest(f"convert {source.name} to {target.name}", "convert", params, ConversionResult)

    def compares(self, args: argparse.Namespace) -> bool:
        return not args.plan

    def report_after(
        self,
        result: "ConversionResult | PlanSummary",
        earlier: Sequence["ConversionResult | PlanSummary"],
        known: Sequence["Variant"] = (),
    ) -> Report:
        """Say the result, and plot size against quality of what was measured of the same model."""
        from ...core.conversion.results import ConversionResult

        del earlier  # of other models
        report = self.report(result)
        if not isinstance(result, ConversionResult):
            return report
        plots = plot_variants(known, result.source)
        title = f"measured against {result.source} so far; /eval adds this one:"
        return Report(report.title, (*report.parts, *((Lines((title,), "dim"), *plots) if plots else ())))

    def report(self, result: "ConversionResult | PlanSummary") -> Report:
        from ...core.quant.results import PlanSummary

        return _planned(result) if isinstance(result, PlanSummary) else _converted(result)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="?", default="", metavar="MODEL", help="folder or name; raw, FP8 or converted"
    )
    parser.add_argument("target", nargs="?", default="", metavar="FOLDER", help="the new folder")
    parser.add_argument("-i", "--input", default="", metavar="MODEL", help="another way to say MODEL")
    parser.add_argument("-o", "--output", default="", metavar="FOLDER", help="another way to say FOLDER")
    parser.add_argument("--force", action="store_true", help="replace an earlier conversion in FOLDER")


def _add_quantization(group: Any) -> None:
    group.add_argument("-q", "--quantize", action="store_true", help="quantize; else bfloat16")
    group.add_argument("--q-bits", dest="bits", type=int, metavar="N", help="the base: 2, 3, 4, 5, 6 or 8")
    group.add_argument(
        "--q-recipe",
        dest="recipe",
        metavar="NAME",
        help="best (measured, under a budget), unsloth (the published cards'), qwen3_5, mixed_2_6, "
        "mixed_3_4, mixed_3_6, mixed_4_6 or none",
    )
    group.add_argument("--recipe-file", metavar="FILE", help="a recipe of your own, in TOML")
    group.add_argument("--q-group-size", dest="group_size", type=int, metavar="N", help="32, 64 or 128")
    group.add_argument(
        "--q-mode",
        dest="mode",
        metavar="MODE",
        help="affine, mxfp4, mxfp8 or nvfp4; mxfp8 costs about four times the KL divergence of 6 affine bits",
    )
    group.add_argument("--q-mxfp", dest="mxfp", action="store_true", help="4 bits become mxfp4, 8 bits mxfp8")
    group.add_argument(
        "--float-map", action="store_true", help="unsloth's fixed map; with --q-mxfp or --q-mode nvfp4"
    )
    group.add_argument(
        "--keep-bf16",
        action="store_true",
        help="leave o_proj, out_proj, in_proj_a and in_proj_b dense, as the published cards have them; by "
        "default they get 8 bits, which measured no loss",
    )
    group.add_argument("--dequantize", action="store_true", help="store a quantized source in bfloat16")


def _add_rounding(group: Any) -> None:
    group.add_argument(
        "--rounding",
        choices=("nearest", "weighted", "gptq"),
        help="as MLX does it; by the best scales of every code; or so that later columns make up for the "
        "errors of earlier ones, which reads a text (gptq). Without it as the published variants are rounded",
    )


def _add_scaling(group: Any) -> None:
    group.add_argument("--imatrix-path", dest="imatrix", metavar="FILE", help="weigh errors by this imatrix")
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


def _one_of(word: str, option: str, name: str, flag: str) -> str:
    if word and option:
        raise UsageError(f"{name} is given twice: as {word:.60} and with {flag} {option:.60}")
    return word or option


def _check_choices(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that contradict each other or would change nothing."""
    if not args.quantize:
        for flag, name in NEEDS_Q.items():
            if getattr(args, name) not in (None, False):
                raise UsageError(f"{flag} would change nothing without -q")
    if args.quantize and args.dequantize:
        raise UsageError("-q and --dequantize contradict each other: give one")
    check_budget(args)
    if args.calibration and not (args.recipe == BEST or args.recipe_file or args.rounding == "gptq"):
        raise UsageError("--calibration would change nothing without --q-recipe best or --rounding gptq")
    if args.recipe and args.recipe_file:
        raise UsageError("--q-recipe and --recipe-file both name a recipe: give one")
    if args.recipe_file and not args.recipe_file.endswith(".toml"):
        raise UsageError(f"--recipe-file is {args.recipe_file}, wanted a .toml file")
    if args.awq and args.imatrix is None:
        raise UsageError(f"--awq {args.awq} needs --imatrix-path: the importances come from there")


def option_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `core.Options`."""
    chosen = {name: value for name in ("bits", "group_size", "mode") if (value := getattr(args, name))}
    recipe = optional_path(args.recipe_file) or args.recipe or "none"
    return {
        "recipe": recipe if args.quantize else UNQUANTIZED,
        "mxfp": args.mxfp,
        "float_map": args.float_map,
        "keep_bf16": args.keep_bf16,
        "mtp": args.mtp,
        "vision": args.vision,
        **chosen,
    }


def flags(args: argparse.Namespace) -> list[str]:
    """Return the choices as words of a command; files by their names alone."""
    given = ["-q"] if args.quantize else []
    given += ["--dequantize"] if args.dequantize else []
    chosen = {flag: getattr(args, name) for flag, name in {**NEEDS_Q, "--awq": "awq"}.items()}
    for flag, value in {**chosen, **budget_words(args)}.items():
        if is_given(value):
            given += [flag] if value is True else [flag, Path(str(value)).name]
    for name in ("mtp", "vision"):
        given += [f"--{name}", getattr(args, name)] if getattr(args, name) != "keep" else []
    return given


def _default_target(source: Path, args: argparse.Namespace, door: Door) -> Path:
    """Return a folder in the user's models folder, named after what is asked for."""
    bits = f"{args.bits}bit" if args.bits else None
    recipe = None if args.recipe == "none" else args.recipe
    parts = (recipe, args.mode or bits, "mxfp" if args.mxfp else None, target_label(args))
    label = "-".join(part for part in parts if part) or ("quantized" if args.quantize else "bf16")
    return door.new_model_folder() / f"{source.name}-{label}"


# --- the result in words ---


def _converted(result: "ConversionResult") -> Report:
    check = result.check
    seconds = f"{format_seconds(result.total_seconds)} with all checks"
    rows = [
        ("time", f"{format_seconds(result.seconds)} to write ({result.speed}), {seconds}"),
        ("logits", _distance(check)),
        *([("kept", f"{result.kept_shards} shards of an earlier run")] if result.kept_shards else []),
        *([("rounding", str(result.rounding))] if result.rounding else []),
        *([("AWQ", _scaled(result))] if result.awq else []),
        *([("bits", _allocated(result.allocation))] if result.allocation else []),
    ]
    errors = [Bar(code, error, f"{error:.2e}") for code, error in check.weights.items()]
    pictured = (Lines(("relative error of the weights, by code:",), "dim"), Bars(errors)) if errors else ()
    folder = f'"{result.folder}"' if " " in result.folder else result.folder
    use = f"chat with it: qchat {folder}, or /load {folder} in a chat"
    said = Lines((*result.warnings, *result.importances, *result.notes, use), "dim")
    size = f"{result.nbytes / GB:,.3f} GB, {result.bits_per_weight:.2f} bits per weight"
    return Report("", (Lines((f"{result.name}: {size}",)), Table(("", ""), rows), *pictured, said))


def _distance(check: "Check") -> str:
    return (
        f"a check of the files over {check.tokens:,} tokens, not of the quality, which eval measures: "
        f"KL divergence {check.kl_divergence:.2e} nats, relative RMS {check.logits_error:.2e}, "
        f"{check.same_top:.0%} of the most likely tokens equal"
    )


def _scaled(result: "ConversionResult") -> str:
    changed = sum(group.changed for group in result.awq)
    return f"changed {changed} of {len(result.awq)} groups: the card lists them"


def _allocated(found: "AllocationSummary") -> str:
    return f"chosen for {found.budget}: {kl_text(found.predicted_kl)}"


def _planned(plan: "PlanSummary") -> Report:
    columns = ("class", "mode", "tensors", "MB", "bits/weight", "MB/token")
    total = (
        "total",
        "",
        f"{sum(row.tensors for row in plan.classes):,}",
        f"{plan.total_bytes / MB:,.1f}",
        f"{plan.bits_per_weight:.2f}",
        f"{plan.bytes_per_token / MB:,.1f}",
    )
    size = f"{plan.total_bytes / GB:.2f} GB ({plan.total_bytes / GIB:.2f} GiB)"
    said = [f"{size}, {plan.disk_bytes / GB:.2f} GB of disk needed"]
    if plan.bandwidth_gb_s is not None:
        speed = f"at most {plan.tokens_per_s or 0:.1f} tokens/s"
        said.append(f"at {plan.bandwidth_gb_s:g} GB/s of memory bandwidth {speed}")
    if plan.predicted_kl is not None and plan.allocation is None:
        said.append(kl_text(plan.predicted_kl))
    parts: tuple[Part, ...] = (
        Table(columns, [*map(_planned_row, plan.classes), total], "<<>>>>"),
        Lines((*said, *plan.notes)),
    )
    if plan.allocation is not None:
        parts = (*parts, *allocation_parts(plan.allocation))
    return Report(plan.source, parts)


def _planned_row(row: "PlannedClass") -> tuple[str, ...]:
    return (
        row.name,
        row.mode,
        f"{row.tensors:,}",
        f"{row.nbytes / MB:,.1f}",
        f"{row.bits_per_weight:.2f}",
        f"{row.read_nbytes / MB:,.1f}",
    )


TASK = Convert()
