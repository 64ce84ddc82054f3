"""Quality at equal bytes: qchat's recipes, mlx-lm's and llama.cpp's, all measured by one reading of one text.

`python tests/peers/bench_quality.py [MODEL] [--text FILE] [--llama-cpp FOLDER]`. The end of the text is
held out, and what comes before it calibrates everything that calibrates. Bytes are those of all tensors but
the MTP head's. llama.cpp's rows need the folder of its shared libraries, which hold its quantizer; its files
are read back as checkpoints.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / ".dev"), str(Path(__file__).parents[2])]

from qchat.core.checkpoint.shards import find_shards, read_headers  # noqa: E402
from qchat.core.machine.subnormals import flush_process  # noqa: E402
from qchat.core.measuring.evaluate import evaluate_models  # noqa: E402
from qchat.core.text.tokenizer import Tokenizer  # noqa: E402
from tests.peers.llama_cpp import convert as write_gguf  # noqa: E402
from tests.peers.llama_cpp import machine  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT.parent / "shared/models"
HELD_OUT_TOKENS = 4200
CALIBRATION_CHUNKS = 64
NGRAM = 13  # tokens in a row that both parts of a text may not share
CARDS = ("2", "3", "4", "5", "6", "8")
MLX_LM: dict[str, dict[str, Any]] = {
    **{f"plain {bits}": {"q_bits": bits, "q_group_size": 64} for bits in (3, 4, 5, 6)},
    **{f"mixed_{pair}": {"quant_predicate": f"mixed_{pair}"} for pair in ("2_6", "3_4", "3_6", "4_6")},
    **{mode: {"q_mode": mode} for mode in ("mxfp4", "nvfp4")},
}


@dataclass(frozen=True)
class Variant:
    """One quantized model; `nbytes` is None where its folder tells."""

    name: str
    folder: Path
    nbytes: int | None = None

    @property
    def size(self) -> int:
        return self.nbytes if self.nbytes is not None else tensor_nbytes(self.folder)


@dataclass(frozen=True)
class Bench:
    """What all variants are made of, and where they go."""

    model: Path
    work: Path
    calibration: Path
    imatrix: Path

    def ours(self, name: str, *options: str) -> Variant:
        """Convert with qchat's own command."""
        folder = self.work / name.replace(" ", "-")
        if not folder.exists():
            run("convert", "-i", str(self.model), "-o", str(folder), "-q", "--mtp", "drop", *options)
        return Variant(f"qchat {name}", folder)

    def card(self, bits: str) -> Variant:
        """Convert with the recipe of the published cards."""
        return self.ours(f"Q{bits}", *self._recipe("unsloth", "--q-bits", bits))

    def best(self, nbytes: int, name: str) -> Variant:
        """Convert with bits by measured sensitivity, and with compensated rounding, into as many bytes."""
        size = ("--target-size", f"{nbytes}B", "--sensitivity", str(self.work / "sensitivity.json"))
        options = self._recipe("best", *size, "--calibration", str(self.calibration), "--rounding", "gptq")
        return self.ours(f"best as {name}", *options)

    def _recipe(self, recipe: str, *options: str) -> tuple[str, ...]:
        return ("--q-recipe", recipe, *options, "--imatrix-path", str(self.imatrix))


def run(*words: str) -> None:
    """Run a command of qchat. Raises RuntimeError with its last words."""
    command = [sys.executable, "-m", "qchat.tui", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-500:]}")


def tensor_nbytes(folder: Path) -> int:
    """The bytes of a checkpoint's tensors without those of its MTP head."""
    headers = read_headers(find_shards(folder))
    return sum(
        entry.end - entry.begin
        for header in headers
        for name, entry in header.entries.items()
        if "mtp." not in name
    )


def split(text: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Cut the text between two lines, so that the end has at least HELD_OUT_TOKENS.

    Lines of the beginning that share NGRAM tokens in a row with the end are left out.
    """
    lines, end = text.splitlines(keepends=True), len(text)
    while lines and len(tokenizer.encode(text[end:])) < HELD_OUT_TOKENS:
        for _ in range(20):
            end -= len(lines.pop()) if lines else 0
    known = set(ngrams(tokenizer.encode(text[end:])))
    return "".join(line for line in lines if known.isdisjoint(ngrams(tokenizer.encode(line)))), text[end:]


def ngrams(ids: list[int]) -> Iterator[tuple[int, ...]]:
    return zip(*(ids[place:] for place in range(NGRAM)), strict=False)


def mlx_lm_variants(bench: Bench) -> Iterator[Variant]:
    mlx_lm = import_module("mlx_lm")
    for name, how in MLX_LM.items():
        folder = bench.work / f"mlx-lm-{name.replace(' ', '-')}"
        if not folder.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the peer's own imports
                mlx_lm.convert(str(bench.model), str(folder), dtype="bfloat16", quantize=True, **how)
        yield Variant(f"mlx-lm {name}", folder)


def llama_cpp_variants(bench: Bench, libraries: Path) -> Iterator[Variant]:
    from tests.peers import llama_quantizer as llama

    quantizer = llama.Quantizer(libraries)
    exact = write_gguf(bench.model, bench.work, "f32")
    source = llama.wrap_rows(exact, bench.work / "wrapped.gguf")
    importance = llama.read_importance(bench.imatrix, source)
    for kind in llama.KINDS:
        file = quantizer.quantize(source, bench.work / f"{kind}.gguf", kind, importance)
        folder = bench.work / f"llama.cpp-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        llama.write_checkpoint_of(bench.model, exact, file.path, folder)
        yield Variant(f"llama.cpp {kind}", folder, file.nbytes)


def variants(bench: Bench, libraries: Path | None) -> Iterator[Variant]:
    """Make every variant, ours of the same bytes right after each of the others."""
    for bits in CARDS:
        card = bench.card(bits)
        yield card
        yield bench.best(card.size, f"Q{bits}")
    yield from mlx_lm_variants(bench)
    for peer in llama_cpp_variants(bench, libraries) if libraries else ():
        yield peer
        yield bench.best(peer.size, peer.name.split()[-1])


def measure(bench: Bench, held_out: Path, made: list[Variant]) -> Iterator[str]:
    """Yield a table of all variants, the smallest first."""
    weights = parameters(bench.model)
    yield "| variant | MB | bits/weight | mean KL | 95 % | 99 % KL | top-1 |"
    yield "|---|---:|---:|---:|---|---:|---:|"
    folders = [variant.folder for variant in made]
    results = evaluate_models(folders, bench.model, data=held_out, report=show)
    for row in sorted(zip(made, results.rows, strict=True), key=lambda pair: pair[0].size):
        variant, overall = row[0], row[1].overall
        low, high = overall.kl_interval or (0.0, 0.0)
        size = f"{variant.size / 1e6:.2f} | {8 * variant.size / weights:.2f}"
        same = f"{100 * (overall.top1_agreement or 0):.1f} %"
        kl = f"{overall.kl_mean:.4f} | {low:.4f} to {high:.4f} | {overall.kl_p99:.3f}"
        yield f"| {variant.name} | {size} | {kl} | {same} |"


def parameters(model: Path) -> int:
    """The weights of a checkpoint of bfloat16, without those of its MTP head."""
    return tensor_nbytes(model) // 2


def show(stage: str, done: int, total: int) -> None:
    if done in (0, total):
        print(f"{stage}: {done:,} of {total:,} tokens", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=MODELS / "qtiny-24m")
    parser.add_argument("--text", type=Path, default=MODELS / "qtiny-24m.calibration.txt")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="llama.cpp's shared libraries")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what is made, for another run")
    args = parser.parse_args()
    flush_process()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        calibration, held_out = work / "calibration.txt", work / "held-out.txt"
        parts = split(args.text.read_text(), Tokenizer.load(args.model))
        for path, part in zip((calibration, held_out), parts, strict=True):
            path.write_text(part)
        bench = Bench(args.model, work, calibration, work / "imatrix.gguf")
        if not bench.imatrix.exists():
            chunks = ("--chunks", str(CALIBRATION_CHUNKS))
            run("calibrate", str(args.model), "--data", str(calibration), "-o", str(bench.imatrix), *chunks)
        for line in machine():
            print(line)
        with suppress(BrokenPipeError):
            for line in measure(bench, held_out, list(variants(bench, args.llama_cpp))):
                print(line, flush=True)


if __name__ == "__main__":
    main()
