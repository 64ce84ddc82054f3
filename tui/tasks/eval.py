"""The task `eval`: how well a model predicts text."""

# ruff: noqa: ARG002  a task need not use all that tasks are given

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..text.report import Bar, Bars, Lines, Part, Plot, Point, Report, Table
from .base import Door, EngineTask, JobRequest, add_json, folder_nbytes, optional_path

if TYPE_CHECKING:
    from ...core.measuring.results import Evaluation, Score

GB = 10**9


class Eval(EngineTask["Evaluation"]):
    """Measure how well a model predicts text, alone or against another.

    Reports perplexity by kind of text; with --reference also the KL divergence from that model and how often
    both find the same token likeliest. In a chat MODEL is the loaded model by default.
    """

    name = "eval"
    usage = "[MODEL] [OPTIONS]"
    memory = "model"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="a model's folder or name")
        parser.add_argument(
            "--reference",
            default="",
            metavar="MODEL",
            help="the model to compare with, usually the unquantized one",
        )
        parser.add_argument("--data", metavar="FILE", help="a text of your own instead of qchat's")
        parser.add_argument("--context", type=int, metavar="N", help="tokens read in one go (512)")
        add_json(parser)

    def check(self, args: argparse.Namespace, door: Door) -> None:
        if not args.model and not door.in_chat:
            raise self.wrong("say which model to measure", door)

    def models(self, args: argparse.Namespace) -> Sequence[str]:
        return (args.model, *([args.reference] if args.reference else []))

    def request(self, args: argparse.Namespace, folders: Sequence[Path], door: Door) -> JobRequest:
        from ...core.measuring.results import Evaluation

        model, *references = folders
        params = {
            "model": str(model),
            "reference": str(references[0]) if references else None,
            "data": optional_path(args.data),
            "context": args.context,
        }
        against = f" against {references[0].name}" if references else ""
        return JobRequest(f"eval {model.name}{against}", "eval", params, Evaluation)

    def report(self, result: "Evaluation") -> Report:
        return self.report_after(result, ())

    def report_after(self, result: "Evaluation", earlier: Sequence["Evaluation"]) -> Report:
        """Say the figures, and plot size against quality of all models that were measured alike."""
        compared = result.reference is not None
        extra = ("reference", "mean KL", "99 % KL", "top-1") if compared else ()
        columns = ("text", "tokens", "perplexity", *extra)
        scores = [*result.scores, result.overall] if len(result.scores) > 1 else result.scores
        figures = [_figure(score, compared=compared) for score in result.scores]
        parts = (
            Table(columns, [_row(score) for score in scores], "<" + ">" * (len(columns) - 1)),
            Lines((f"{'mean KL in nats' if compared else 'perplexity'} by kind of text:",), "dim"),
            Bars([Bar(s.kind, n, f"{n:.4g}") for s, n in zip(result.scores, figures, strict=True)]),
        )
        return Report("", (*parts, *size_against_quality([*earlier, result])))


def _figure(score: "Score", *, compared: bool) -> float:
    return (score.kl_mean or 0.0) if compared else score.perplexity


def _row(score: "Score") -> tuple[str, ...]:
    cells = (score.kind, f"{score.tokens:,}", f"{score.perplexity:,.4g}")
    if score.kl_mean is None:
        return cells
    return (
        *cells,
        f"{score.reference_perplexity or 0:,.4g}",
        f"{score.kl_mean:.6f}",
        f"{score.kl_p99 or 0:.5f}",
        f"{100 * (score.top1_agreement or 0):.2f} %",
    )


def size_against_quality(results: Sequence["Evaluation"]) -> tuple[Part, ...]:
    """Plot a point for each model that was measured like the last one; a single one is not plotted."""
    last = results[-1]
    compared = last.reference is not None
    like = [one for one in results if (one.reference, one.context) == (last.reference, last.context)]
    places = {one.model: _figure(one.overall, compared=compared) for one in like}
    if last.reference is not None:
        places.setdefault(last.reference, 0.0)
    points = [
        Point(folder_nbytes(Path(model)) / GB, value, Path(model).name) for model, value in places.items()
    ]
    return (Plot(points, "GB", "mean KL (nats)" if compared else "perplexity"),) if len(points) > 1 else ()


TASK = Eval()
