"""Races qchat against mlx-lm on one model: a prompt of 512 tokens, then 128 greedy tokens, same ids for both.

`python tests/peers/bench_peer.py [MODEL]`. Each engine runs in processes of its own (they put different BLAS
libraries under MLX), taking turns; the first prompt of a process is cold: it pays for compilation and page
faults. Prefill is timed from the prompt to the first token, decode from the first token to the last.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QTINY = ROOT.parent / "shared/models/qtiny-24m"
TEXT = ROOT / "tests/golden/text.txt"
PROMPT_TOKENS = 512
DECODE_TOKENS = 128
COLD_AND_WARM_PROMPTS = 3
MEBIBYTE = 1 << 20

Generate = Callable[[list[int]], Iterator[int]]


@dataclass
class Result:
    """What one process measured: seconds, one per prompt; the ids of its first prompt; bytes."""

    load_s: float = 0.0
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    peak_nbytes: int = 0


def open_qchat(model: Path) -> Generate:
    from qchat.core.conversation.session import Engine
    from qchat.core.generation.decode import Decoder, prefill
    from qchat.core.generation.sampling import Sampling

    engine = Engine.load(model)

    def generate(ids: list[int]) -> Iterator[int]:
        cache = engine.model.new_cache()
        for _ in prefill(engine.model, cache, ids):
            pass
        decoder = Decoder(engine.model, cache, Sampling(temperature=0.0))
        while True:
            yield decoder.next()

    return generate


def open_mlx_lm(model: Path) -> Generate:
    import mlx.core as mx

    generate_step = import_module("mlx_lm.generate").generate_step
    loaded, _ = import_module("mlx_lm.utils").load_model(model)
    return lambda ids: (int(token) for token, _ in generate_step(mx.array(ids), loaded, max_tokens=-1))


ENGINES: dict[str, Callable[[Path], Generate]] = {"qchat": open_qchat, "mlx-lm": open_mlx_lm}


def work(engine: str, model: Path, prompts: list[list[int]]) -> Result:
    """Run every prompt in this process, the first one cold."""
    result, began = Result(), time.perf_counter()
    generate = ENGINES[engine](model)
    result.load_s = time.perf_counter() - began
    for prompt in prompts:
        began = time.perf_counter()
        tokens = generate(prompt)
        ids = [next(tokens)]
        first = time.perf_counter()
        ids += itertools.islice(tokens, DECODE_TOKENS - 1)
        result.decode_s.append(time.perf_counter() - first)
        result.prefill_s.append(first - began)
        result.ids = result.ids or ids
    # Linux counts kibibytes, macOS bytes
    unit = 1 if sys.platform == "darwin" else 1024
    result.peak_nbytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return result


def race(engine: str, model: Path, prompts: list[list[int]]) -> Result:
    """`work` in a fresh process, which finds none of the compiled kernels that MLX keeps in TMPDIR."""
    command = [sys.executable, __file__, str(model), "--worker", engine]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            command,
            input=json.dumps(prompts),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"TMPDIR": scratch},
        )
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def make_prompts(model: Path) -> list[list[int]]:
    """Prompts of the calibration text beside the model, or of the committed text, over and over."""
    from tokenizers import Tokenizer

    beside = model.with_name(model.name + ".calibration.txt")
    text = (beside if beside.exists() else TEXT).read_text()
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    stream = itertools.cycle(ids)
    return [list(itertools.islice(stream, PROMPT_TOKENS)) for _ in range(COLD_AND_WARM_PROMPTS)]


def rates(results: list[Result], prompts: slice) -> tuple[list[float], list[float]]:
    """Prefill and decode in tokens/s of the chosen prompts of each process."""
    prefill = [PROMPT_TOKENS / s for r in results for s in r.prefill_s[prompts]]
    decode = [(DECODE_TOKENS - 1) / s for r in results for s in r.decode_s[prompts]]
    return prefill, decode


def report(results: dict[str, list[Result]]) -> None:
    """The table: both engines and the ratio, cold and warm."""
    print(f"{'':38}" + "".join(f"{engine:>10}" for engine in results) + f"{'ratio':>9}")
    cold, warm = slice(0, 1), slice(1, None)
    for label, prompts, pick in (
        ("first prompt, median", cold, statistics.median),
        ("warm, median", warm, statistics.median),
        ("warm, best", warm, max),
    ):
        measured = [rates(runs, prompts) for runs in results.values()]
        for what, column in (("prefill", 0), ("decode", 1)):
            row(f"{what} tokens/s, {label}", [pick(engine[column]) for engine in measured])
    row("import and load, median s", [statistics.median(r.load_s for r in runs) for runs in results.values()])
    row("peak memory, MiB", [max(r.peak_nbytes for r in runs) / MEBIBYTE for runs in results.values()])
    ours, theirs = (runs[0].ids for runs in results.values())
    agree = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    print(f"greedy ids of the first prompt: the first {agree} of {len(ours)} agree")


def row(label: str, values: list[float]) -> None:
    ours, theirs = values
    print(f"{label:38}{ours:10.1f}{theirs:10.1f}{ours / theirs:8.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description="Race qchat against mlx-lm on one model.")
    parser.add_argument("model", type=Path, nargs="?", default=QTINY, help=f"model folder (default {QTINY})")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each engine (default 3)")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(asdict(work(args.worker, args.model, json.load(sys.stdin)))))
        return
    print(
        f"{args.model.name}; load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )
    prompts = make_prompts(args.model)
    results: dict[str, list[Result]] = {engine: [] for engine in ENGINES}
    for _ in range(args.rounds):
        for engine, runs in results.items():
            runs.append(race(engine, args.model, prompts))
    report(results)


if __name__ == "__main__":
    main()
