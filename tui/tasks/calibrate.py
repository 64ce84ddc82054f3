"""The task `calibrate`: importance matrices."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..text.report import Lines, Report, Table
from ..user.paths import user_path
from .base import Door, EngineTask, JobRequest, add_json, optional_path

if TYPE_CHECKING:
    from ...core.measuring.results import Calibration


class Calibrate(EngineTask["Calibration"]):
    """Measure which inputs of a model matter, for --imatrix-path.

    Reads a text with the model, best the unquantized one, and writes an importance matrix in GGUF, which
    convert takes. A stopped run resumes. In a chat MODEL is the loaded model by default, and FILE is in the
    models folder.
    """

    name = "calibrate"
    usage = "[MODEL] [-o FILE] [OPTIONS]"
    memory = "model"
    interrupted = "the same command resumes from the sums that were saved"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="a model's folder or name")
        parser.add_argument("-o", "--output", metavar="FILE", help="the new imatrix")
        parser.add_argument("--data", metavar="FILE", help="a text of your own instead of qchat's")
        parser.add_argument("--chunk-size", type=int, metavar="N", help="tokens read in one go (512)")
        parser.add_argument("--chunks", type=int, metavar="N", help="read at most N chunks")
        add_json(parser)

    def check(self, args: argparse.Namespace, door: Door) -> None:
        if not door.in_chat and not args.model:
            raise self.wrong("say which model to measure", door)
        if not door.in_chat and not args.output:
            raise self.wrong("-o FILE is needed: where the imatrix goes", door)

    def request(self, args: argparse.Namespace, folders: Sequence[Path], door: Door) -> JobRequest:
        from ...core.measuring.results import Calibration

        (model,) = folders
        output = user_path(args.output) if args.output else _default_output(model, door)
        params = {
            "model": str(model),
            "output": str(output),
            "data": optional_path(args.data),
            "chunk_size": args.chunk_size,
            "chunks": args.chunks,
        }
        return JobRequest(f"calibrate {model.name}", "calibrate", params, Calibration)

    def report(self, result: "Calibration") -> Report:
        rows = [
            ("file", str(result.path)),
            ("matrices", f"{result.modules:,}"),
            ("read", f"{result.chunks:,} chunks of {result.chunk_size:,} tokens"),
        ]
        if result.resumed:
            rows.append(("resumed", f"after chunk {result.resumed:,} of an earlier run"))
        if result.experts:
            rows.append(("experts no token reached", f"{result.unreached:,} of {result.experts:,}"))
        use = f"convert MODEL -q --imatrix-path {result.path} uses it"
        return Report("", (Table(("", ""), rows), Lines((use,), "dim")))


def _default_output(model: Path, door: Door) -> Path:
    return door.new_model_folder() / f"{model.name}-imatrix.gguf"


TASK = Calibrate()
