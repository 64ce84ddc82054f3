"""Peak memory of measuring sensitivities, choosing bits and rounding with compensation, at true widths.

`PYTHONPATH=.dev:. python tests/bench_memory.py [27B] [35B-A3B]` writes random models of a few layers with the
widths and experts of the published ones, and converts each twice under a budget: once straight, once killed
at random moments, while it measures as well as while it rounds, and resumed. Exit code 1 if the straight run
takes more than BUDGET_NBYTES and one layer in bfloat16, or if the two give different bytes.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qchat.core.conversion.layer_rounding import CALIBRATION_TEXT
from qchat.core.conversion.source import Source
from tests.checkpoints import write_checkpoint
from tests.paths import ROOT

BUDGET_NBYTES = 3_000_000_000
VOCABULARY = 16_384  # the published one is 248,320; the head is read in slices
CHARACTERS = 700  # of text, each a token; more text takes longer, and no more memory
COMMON = {
    "mtp": False,
    "tied": False,
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
}
CUTS: dict[str, dict[str, Any]] = {
    "27B": {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 48,
    },
    "35B-A3B": {
        "moe": True,
        "hidden_size": 2048,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 32,
    },
}
# as coarsely as the whole models are measured
QCHAT = """
import sys
from qchat.core.allocation import design
from qchat.tui.cli.main import main
design.DETAILS = design.DETAILS[-1:]
sys.exit(main())
"""
CHANGING = ("README.md", "conversion.json")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the memory of conversions.")
    parser.add_argument("models", nargs="*", default=list(CUTS), help=", ".join(CUTS))
    parser.add_argument("--kills", type=int, default=2, help="how often each phase is killed (2)")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help=f"of text ({CHARACTERS})")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help=f"tokens ({VOCABULARY})")
    parser.add_argument("--layers", type=int, default=2, help="how many are left of the model (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of death (0)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        (name,) = args.models
        kinds = ["linear_attention" if i % 2 == 0 else "full_attention" for i in range(args.layers)]
        depth = {"num_hidden_layers": args.layers, "layer_types": kinds}
        write_checkpoint(args.write, **COMMON, **CUTS[name], **depth, vocab_size=args.vocabulary)
        return 0
    fine = True
    for name in args.models:
        with tempfile.TemporaryDirectory(prefix="qchat-memory-") as folder:
            fine &= _Bench(name, Path(folder), args, random.Random(args.seed)).run()
    return int(not fine)


class _Bench:
    """The two conversions of one cut, in a folder of their own."""

    def __init__(self, name: str, place: Path, args: argparse.Namespace, choose: random.Random):
        self.name, self.place, self.kills, self.choose = name, place, args.kills, choose
        self.source = place / "source"
        # in a process of its own: a child's peak counts that of its parent
        sizes = ["--vocabulary", str(args.vocabulary), "--layers", str(args.layers)]
        subprocess.run([sys.executable, __file__, name, "--write", str(self.source), *sizes], check=True)
        (place / "text.txt").write_text(CALIBRATION_TEXT.read_text()[: args.characters])

    def run(self) -> bool:
        """Convert twice, print the figures, and return whether they are as they should be."""
        layer = largest_layer(self.source)
        peak, measuring, rounding = self.straight()
        self.say(f"a layer {layer / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {measuring + rounding:.0f} s")
        moments = self.kill("measuring", measuring) + self.kill("rounding", rounding)
        if self.start("killed").wait():
            sys.exit(f"{self.name}: the conversion could not be resumed")
        same = digests(self.place / "straight") == digests(self.place / "killed")
        found = "the same bytes" if same else "OTHER BYTES"
        self.say(f"killed after {', '.join(moments)} and resumed: {found}")
        return same and peak <= BUDGET_NBYTES + layer

    def straight(self) -> tuple[int, float, float]:
        """Convert at one go; return the peak in bytes, and the seconds of measuring and of rounding."""
        began = time.time()
        _, status, usage = os.wait4(self.start("straight").pid, 0)
        ended = time.time()
        if status:
            sys.exit(f"{self.name}: the conversion failed")
        measured = self.sensitivity("straight").stat().st_mtime
        unit = 1 if sys.platform == "darwin" else 1024
        return usage.ru_maxrss * unit, measured - began, ended - measured

    def kill(self, phase: str, seconds: float) -> list[str]:
        """Kill the other conversion some times in a phase that lasts `seconds`; return the moments."""
        moments = []
        for _ in range(self.kills):
            process = self.start("killed")
            while phase == "rounding" and not self.sensitivity("killed").exists() and process.poll() is None:
                time.sleep(0.1)
            moment = self.choose.uniform(0.05, 0.95 / self.kills) * seconds
            try:
                process.wait(moment)
                moments.append("its end")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                moments.append(f"{moment:.0f} s of {phase}")
        return moments

    def sensitivity(self, name: str) -> Path:
        return self.place / f"{name}.json"

    def start(self, name: str) -> "subprocess.Popen[bytes]":
        """Begin to convert into the folder `name`; its sensitivities lie beside it."""
        folders = [str(self.source), str(self.place / name)]
        options = ["--q-recipe", "best", "--target-bpw", "4", "--rounding", "gptq", "--json"]
        files = ["--calibration", str(self.place / "text.txt"), "--sensitivity", str(self.sensitivity(name))]
        return subprocess.Popen(
            [sys.executable, "-P", "-c", QCHAT, "convert", *folders, *options, *files],
            env=os.environ | {"PYTHONPATH": str(ROOT / ".dev")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)


def largest_layer(folder: Path) -> int:
    """Return the bytes of the largest layer as it is stored, in bfloat16."""
    sizes: dict[str, int] = {}
    for name, spec in Source.open(folder).specs.items():
        if name.startswith("layers."):
            count = 2
            for length in spec.shape:
                count *= length
            number = name.split(".")[1]
            sizes[number] = sizes.get(number, 0) + count
    return max(sizes.values())


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a conversion, but for those that tell seconds."""
    files = [path for path in sorted(folder.iterdir()) if path.name not in CHANGING]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
