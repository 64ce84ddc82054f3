"""The task `plan`: the memory that a model needs."""

# ruff: noqa: ARG002  a task need not use all that tasks are given

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..text.report import Report, Table
from .base import Door, EngineTask, JobRequest, add_json

if TYPE_CHECKING:
    from ...core.model.memory_figures import MemoryPlan

GB = 10**9


class Plan(EngineTask["MemoryPlan"]):
    """Show the memory that a model needs and the context that fits.

    Reads headers only. A model that does not fit is refused, with what would fit. In a chat MODEL is the
    loaded model by default.
    """

    name = "plan"
    usage = "[MODEL] [OPTIONS]"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="a model's folder or name")
        parser.add_argument("--context", type=int, metavar="N", help="tokens of context that must fit")
        parser.add_argument("--kv-bits", type=int, choices=(8,), help="keep keys and values at 8 bits")
        parser.add_argument(
            "--image-tokens", type=int, metavar="N", help="a picture of N tokens must fit besides"
        )
        add_json(parser)

    def check(self, args: argparse.Namespace, door: Door) -> None:
        if not args.model and not door.in_chat:
            raise self.wrong("say which model to plan for", door)

    def request(self, args: argparse.Namespace, folders: Sequence[Path], door: Door) -> JobRequest:
        from ...core.model.memory_figures import MemoryPlan

        (model,) = folders
        limits = {"context": args.context, "kv_bits": args.kv_bits, "image_tokens": args.image_tokens}
        params = {"model": str(model), **limits}
        return JobRequest(f"plan {model.name}", "memory_plan", params, MemoryPlan)

    def report(self, result: "MemoryPlan") -> Report:
        needs = (
            ("weights", result.weights_nbytes),
            ("recurrent and convolution states", result.state_nbytes),
            (f"keys and values of {result.context:,} tokens", result.kv_nbytes),
            (f"reading a prompt {result.chunk:,} tokens at a time", result.transient_nbytes),
            ("snapshots of earlier turns", result.snapshot_nbytes),
            ("the process", result.process_nbytes),
            ("in all", result.total_nbytes),
        )
        rows = [(name, f"{nbytes / GB:,.2f} GB") for name, nbytes in needs]
        free = f"{result.free_nbytes / GB:,.2f} GB" if result.free_nbytes else "unknown"
        rows.append(("this machine can give", free))
        if result.picture_nbytes:
            name = f"besides, a picture of up to {result.picture_tokens:,} tokens and the vision tower"
            rows.append((name, f"{result.picture_nbytes / GB:,.2f} GB"))
        return Report("", (Table(("", ""), rows, "<>"),))


TASK = Plan()
