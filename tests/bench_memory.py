"""Peak memory of measuring sensitivities, choosing bits and rounding with compensation, at true widths.

`PYTHONPATH=.dev:. python tests/bench_memory.py [27B] [35B-A3B]` writes random models of two layers with the
widths and experts of the published ones, and converts each twice under a budget: once straight, once killed
at random moments and resumed. Exit code 1 if the straight run takes more than BUDGET_NBYTES and one layer in
bfloat16, or if the two give different bytes.
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
TEXT_CHARACTERS = 12_000  # more text takes longer, and no more memory
COMMON = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "vocab_size": 16384,
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
CHANGING = ("README.md", "conversion.json")  # they tell seconds


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the memory of conversions.")
    parser.add_argument("models", nargs="*", default=list(CUTS), help=", ".join(CUTS))
    parser.add_argument("--kills", type=int, default=3, help="how often the second run is killed (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of death (0)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        (name,) = args.models
        write_checkpoint(args.write, **COMMON, **CUTS[name])
        return 0
    fine = True
    for name in args.models:
        with tempfile.TemporaryDirectory(prefix="qchat-memory-") as folder:
            fine &= check(name, Path(folder), args.kills, random.Random(args.seed))
    return int(not fine)


def check(name: str, place: Path, kills: int, choose: random.Random) -> bool:
    """Convert one cut twice, print the figures, and return whether they are as they should be."""
    source = place / "source"
    # in a process of its own: a child's peak counts that of its parent
    subprocess.run([sys.executable, __file__, name, "--write", str(source)], check=True)
    layer = largest_layer(source)
    (place / "text.txt").write_text(CALIBRATION_TEXT.read_text()[:TEXT_CHARACTERS])
    began = time.perf_counter()
    process = start(place, "straight")
    _, status, usage = os.wait4(process.pid, 0)
    seconds, peak = time.perf_counter() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if status:
        sys.exit(f"{name}: the conversion failed")
    print(f"{name}: a layer {layer / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {seconds:.0f} s", flush=True)
    moments = [choose.uniform(0.05, 0.6) * seconds for _ in range(kills)]
    for moment in moments:
        kill_after(start(place, "killed"), moment)
    if start(place, "killed").wait():
        sys.exit(f"{name}: the conversion could not be resumed")
    same = digests(place / "straight") == digests(place / "killed")
    when = ", ".join(f"{moment:.0f}" for moment in moments)
    print(
        f"{name}: killed after {when} s and resumed: {'the same bytes' if same else 'OTHER BYTES'}",
        flush=True,
    )
    return same and peak <= BUDGET_NBYTES + layer


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


def start(place: Path, name: str) -> "subprocess.Popen[bytes]":
    """Begin to convert into the folder `name`; its sensitivities lie beside it."""
    command = [sys.executable, "-P", "-m", "qchat.tui", "convert", str(place / "source"), str(place / name)]
    options = ["--q-recipe", "best", "--target-bpw", "4", "--rounding", "gptq", "--json"]
    files = ["--calibration", str(place / "text.txt"), "--sensitivity", str(place / f"{name}.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev")}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [*command, *options, *files], env=environment, stdin=quiet, stdout=quiet, start_new_session=True
    )


def kill_after(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Kill the process and its children, unless it has ended by then."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.iterdir()) if path.name not in CHANGING]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
