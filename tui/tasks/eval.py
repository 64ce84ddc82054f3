"""The task `eval`: how well a model predicts text."""

# ruff: noqa: ARG002  a task need not use all that tasks are given

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text.report import Bar, Bars, Lines, Part, Plot, Point, Report, Table
from .base import Door, EngineTask, JobRequest, add_json, folder_nbytes, optional_path

if TYPE_CHECKING:
    from ...core.measuring.results import Evaluation, Evaluations, Interval, Score
    from .variants import Variant

GB = 10**9
COMPARED = ("mean KL", "95 %", "99 % KL", "top-1")


class Eval(EngineTask["Evaluations"]):
    """Measure how well models predict text, alone or against another.

    Reports perplexity by kind of text; with --reference also the KL divergence from that model, its 95 %
    confidence interval, how often both find the same token likeliest, and where they do not. Several models
    are listed by size, each with the interval of how far it is behind the closest one. In a chat MODEL is the
    loaded model by default. What was measured with qchat's own text stands in the list of models.
    """

    name = "eval"
    usage = "[MODEL...] [OPTIONS]"
    memory = "model"
    most_models = 100

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("models", nargs="*", metavar="MODEL", help="a model's folder or name")
        parser.add_argument(
            "--reference",
            default="",
            metavar="MODEL",
            help="the model to compare with, usually the unquantized one",
        )
        parser.add_argument("--data", metavar="FILE", help="a text of your own instead of qchat's")
        parser.add_argument("--context", type=int, metavar="N", help="tokens read in one go (512)")
        parser.add_argument(
            "--flips",
            type=int,
            metavar="N",
            help="list N tokens where another one is likeliest than to the reference (5)",
        )
        parser.add_argument(
            "--plot",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="plot size against quality where there are several models (on)",
        )
        add_json(parser)

    def check(self, args: argparse.Namespace, door: Door) -> None:
        if not args.models and not door.in_chat:
            raise self.wrong("say which models to measure", door)

    def models(self, args: argparse.Namespace) -> Sequence[str]:
        return (*(args.models or ("",)), *([args.reference] if args.reference else []))

    def request(self, args: argparse.Namespace, folders: Sequence[Path], door: Door) -> JobRequest:
        from ...core.measuring.results import Evaluations

        models = folders[:-1] if args.reference else folders
        params = {
            "models": [str(model) for model in models],
            "reference": str(folders[-1]) if args.reference else None,
            "data": optional_path(args.data),
            "context": args.context,
            "flips": args.flips,
        }
        against = f" against {folders[-1].name}" if args.reference else ""
        title = f"eval {', '.join(model.name for model in models)}{against}"
        return JobRequest(title, "eval", params, Evaluations, plotted=args.plot)

    def json_value(self, value: Mapping[str, Any]) -> Any:
        rows = value["rows"]
        return rows[0] if len(rows) == 1 else value

    def report(self, result: "Evaluations") -> Report:
        return self.report_after(result, ())

    def compares(self, args: argparse.Namespace) -> bool:
        """Return whether the text is the one that other models were measured with."""
        return bool(args.reference) and args.plot and args.data is None and args.context is None

    def report_after(
        self,
        result: "Evaluations",
        earlier: Sequence["Evaluations"],
        known: Sequence["Variant"] = (),
    ) -> Report:
        """Say the figures, and plot size against quality of all models that were measured alike."""
        told = [_one_model(result.rows[0])] if len(result.rows) == 1 else [_models(result), _kinds(result)]
        measured = [row for one in (*earlier, result) for row in one.rows]
        parts = [part for parts in told for part in parts]
        return Report("", (*parts, *_flips(result.rows), *size_against_quality(measured, known)))


def _one_model(row: "Evaluation") -> Sequence[Part]:
    """Return a table and bars with the figures of each kind of text."""
    compared = row.reference is not None
    columns = ("text", "tokens", "perplexity", *(("reference", *COMPARED) if compared else ()))
    scores = [*row.scores, row.overall] if len(row.scores) > 1 else row.scores
    cells = [
        (score.kind, f"{score.tokens:,}", f"{score.perplexity:,.4g}", *_compared(score, reference=True))
        for score in scores
    ]
    figures = [_figure(score, compared=compared) for score in row.scores]
    return (
        Table(columns, cells, "<" + ">" * (len(columns) - 1)),
        _kinds_title(compared=compared),
        Bars([Bar(s.kind, n, f"{n:.4g}") for s, n in zip(row.scores, figures, strict=True)]),
    )


def _models(result: "Evaluations") -> Sequence[Part]:
    """Return a table with a row for each model, the smallest first."""
    compared = result.rows[0].reference is not None
    columns = ("model", "GB", "perplexity", *((*COMPARED, "behind the closest") if compared else ()))
    pairs = sorted(zip(result.rows, result.behind, strict=True), key=lambda pair: pair[0].nbytes)
    cells = [
        (
            Path(row.model).name,
            f"{row.nbytes / GB:.4g}",
            f"{row.overall.perplexity:,.4g}",
            *_compared(row.overall, reference=False),
            *((_interval(behind),) if compared else ()),
        )
        for row, behind in pairs
    ]
    return (Table(columns, cells, "<" + ">" * (len(columns) - 1)),)


def _kinds(result: "Evaluations") -> Sequence[Part]:
    """Return a table of the models' figures by kind of text."""
    compared = result.rows[0].reference is not None
    rows = sorted(result.rows, key=lambda row: row.nbytes)
    cells = [
        (Path(row.model).name, *(f"{_figure(score, compared=compared):.4g}" for score in row.scores))
        for row in rows
    ]
    columns = ("model", *(score.kind for score in rows[0].scores))
    return (_kinds_title(compared=compared), Table(columns, cells, "<" + ">" * (len(columns) - 1)))


def _kinds_title(*, compared: bool) -> Lines:
    return Lines((f"{'mean KL in nats' if compared else 'perplexity'} by kind of text:",), "dim")


def _flips(rows: Sequence["Evaluation"]) -> Sequence[Part]:
    """Return a table of the tokens where another one is likeliest than to the reference."""
    cells = [
        (Path(row.model).name, flip.kind, f"…{flip.before}", flip.reference, flip.model, f"{flip.kl:.2f}")
        for row in rows
        for flip in row.flips
    ]
    if not cells:
        return ()
    columns = ("model", "text", "before", "reference", "model's", "KL")
    title = "where the likeliest token flips, the greatest divergence first:"
    return (Lines((title,), "dim"), Table(columns, [tuple(map(_visible, row)) for row in cells], "<<<<<>"))


def _visible(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "→")


def _figure(score: "Score", *, compared: bool) -> float:
    return (score.kl_mean or 0.0) if compared else score.perplexity


def _compared(score: "Score", *, reference: bool) -> tuple[str, ...]:
    """Return the cells of COMPARED, after the reference's perplexity if that is wanted; none without one."""
    if score.kl_mean is None:
        return ()
    return (
        *((f"{score.reference_perplexity or 0:,.4g}",) if reference else ()),
        f"{score.kl_mean:.6f}",
        _interval(score.kl_interval),
        f"{score.kl_p99 or 0:.5f}",
        f"{100 * (score.top1_agreement or 0):.2f} %",
    )


def _interval(ends: "Interval | None") -> str:
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def size_against_quality(
    results: Sequence["Evaluation"], known: Sequence["Variant"] = ()
) -> tuple[Part, ...]:
    """Plot a point for each model that was measured like the last one; a single one is not plotted."""
    last = results[-1]
    compared = last.reference is not None
    like = [one for one in results if (one.reference, one.context) == (last.reference, last.context)]
    places = {one.model: (one.nbytes, _figure(one.overall, compared=compared)) for one in like}
    for variant in known:
        if compared and variant.reference == last.reference:
            places.setdefault(variant.folder, (variant.nbytes, variant.kl_mean))
    if last.reference is not None:
        places.setdefault(last.reference, (folder_nbytes(Path(last.reference)), 0.0))
    points = [Point(nbytes / GB, value, Path(model).name) for model, (nbytes, value) in places.items()]
    return (Plot(points, "GB", "mean KL (nats)" if compared else "perplexity"),) if len(points) > 1 else ()


TASK = Eval()
