"""The task `inspect`: what a model folder holds."""

# ruff: noqa: ARG002  a task need not use all that tasks are given

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..text.report import Bar, Bars, Lines, Part, Report, Table
from .base import Door, EngineTask, JobRequest, add_json

if TYPE_CHECKING:
    from ...core.conversion.results import ClassSummary, InspectionSummary, TensorSummary

MB, GB, GIB = 10**6, 10**9, 1 << 30
MAX_SHAPES = 2


class Inspect(EngineTask["InspectionSummary"]):
    """Show what a model folder holds, by class of tensors.

    Lists each class, or with --tensors every tensor, with its code, shape and bytes, and what the loader had
    to interpret. In a chat MODEL is the loaded model by default.
    """

    name = "inspect"
    usage = "[MODEL] [OPTIONS]"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="a model's folder or name")
        parser.add_argument("--tensors", action="store_true", help="list every tensor instead of the classes")
        add_json(parser)

    def check(self, args: argparse.Namespace, door: Door) -> None:
        if not args.model and not door.in_chat:
            raise self.wrong("say which model to inspect", door)

    def request(self, args: argparse.Namespace, folders: Sequence[Path], door: Door) -> JobRequest:
        from ...core.conversion.results import InspectionSummary

        (model,) = folders
        params = {"model": str(model), "tensors": args.tensors}
        return JobRequest(f"inspect {model.name}", "inspect", params, InspectionSummary)

    def report(self, result: "InspectionSummary") -> Report:
        parts = _classes(result.classes) if result.tensors is None else (_tensors(result.tensors),)
        remarks = [f"- {sentence}" for sentence in (*result.repairs, *result.notices)]
        return Report(
            result.model,
            (Lines((_architecture(result),)), *parts, Lines((_size(result),)), Lines(remarks, "dim")),
        )


def _architecture(result: "InspectionSummary") -> str:
    experts = f", {result.experts_per_token} of {result.experts} experts" if result.experts else ""
    return (
        f"{result.model_type}: {result.layers} layers ({result.attention_layers} attention), "
        f"hidden {result.hidden_size:,}{experts}, vocabulary {result.vocab_size:,}, "
        f"context {result.context:,}"
    )


def _size(result: "InspectionSummary") -> str:
    return (
        f"{result.total_bytes / GB:.3f} GB ({result.total_bytes / GIB:.3f} GiB), "
        f"{result.weights / MB:,.1f} M weights in {result.tensor_count:,} tensors, "
        f"{result.bits_per_weight:.2f} bits per weight"
    )


def _classes(classes: Sequence["ClassSummary"]) -> tuple[Part, ...]:
    rows = [
        (
            one.kind,
            _code(one),
            f"{one.tensors:,}",
            f"{one.nbytes / MB:,.1f}",
            f"{one.bits_per_weight:.2f}",
            _shapes(one.shapes),
        )
        for one in classes
    ]
    bars = [Bar(f"{one.kind} {_code(one)}", one.nbytes, f"{one.nbytes / MB:,.1f} MB") for one in classes]
    return (Table(("class", "code", "tensors", "MB", "bits/weight", "shapes"), rows, "<<>>><"), Bars(bars))


def _tensors(tensors: Sequence["TensorSummary"]) -> Table:
    rows = [(one.name, _code(one), _shape(one.shape), f"{one.nbytes:,}") for one in tensors]
    return Table(("tensor", "code", "shape", "bytes"), rows, "<<>>")


def _code(one: "ClassSummary | TensorSummary") -> str:
    return one.mode if one.group_size is None else f"{one.mode} {one.bits}-bit group {one.group_size}"


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    more = len(shapes) - MAX_SHAPES
    return ", ".join(map(_shape, shapes[:MAX_SHAPES])) + (f" + {more}" if more > 0 else "")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


TASK = Inspect()
