"""Races qchat against mlx-lm and llama.cpp on one model: a prompt of 512 tokens, then 128 greedy tokens.

`python tests/peers/bench_peer.py [MODEL]`. All get the same ids and as many threads. Each engine runs in
processes of its own, in turn; llama.cpp on files of float32, bf16 and 8 bits. The first prompt of a process
is cold: it pays for page faults, and mlx-lm for its compiler; qchat's kernels are compiled before, as the app
does in the background. Prefill is timed up to the first token, decode from there to the last.
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
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / ".dev"), str(Path(__file__).parents[2])]

from tests.peers import llama_cpp  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
QTINY = ROOT.parent / "shared/models/qtiny-24m"
TEXT = ROOT / "tests/golden/text.txt"
PROMPT_TOKENS = 512
DECODE_TOKENS = 128
COLD_AND_WARM_PROMPTS = 3
MEBIBYTE = 1 << 20

Generate = Callable[[list[int]], Iterator[int]]


@dataclass
class RaceResult:
    """What one process measured: seconds, one per prompt; the ids of its first prompt; bytes."""

    load_s: float = 0.0
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    peak_nbytes: int = 0
    facts: list[str] = field(default_factory=list)


def open_qchat(model: Path) -> Generate:
    from qchat.core.machine.subnormals import flush_process

    flush_process()  # as qchat's own processes do
    from qchat.core.engine.engine import Engine
    from qchat.core.generation.decode import Decoder, prefill
    from qchat.core.generation.sampling import Sampling

    engine = Engine.load(model)
    if engine.precompiler is not None:
        engine.precompiler.wait()

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


def work(engine: str, model: Path, prompts: list[list[int]]) -> RaceResult:
    """Run every prompt in this process, the first one cold."""
    result = RaceResult()
    WORKERS[engine](model, prompts, result)
    # Linux counts kibibytes, macOS bytes
    unit = 1 if sys.platform == "darwin" else 1024
    result.peak_nbytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return result


def work_in_python(
    load: Callable[[Path], Generate], model: Path, prompts: list[list[int]], result: RaceResult
) -> None:
    began = time.perf_counter()
    generate = load(model)
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
    if load is open_qchat:
        result.facts = list(llama_cpp.machine())


def work_in_llama_cpp(model: Path, prompts: list[list[int]], result: RaceResult) -> None:
    began = time.perf_counter()
    engine = llama_cpp.LlamaCpp(model, llama_cpp.threads())
    result.load_s = time.perf_counter() - began
    for prompt in prompts:
        prefill, token = engine.run(prompt, DECODE_TOKENS)
        result.prefill_s.append(prefill)
        result.decode_s.append(token * (DECODE_TOKENS - 1))


Work = Callable[[Path, list[list[int]], RaceResult], None]
WORKERS: dict[str, Work] = {
    "qchat": partial(work_in_python, open_qchat),
    "mlx-lm": partial(work_in_python, open_mlx_lm),
    **dict.fromkeys(llama_cpp.FORMS, work_in_llama_cpp),
}


def race(engine: str, model: Path, prompts: list[list[int]]) -> RaceResult:
    """`work` in a fresh process, which finds none of the kernels that MLX compiles into TMPDIR."""
    command = [sys.executable, __file__, str(model), "--worker", engine]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            command,
            input=json.dumps(prompts),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if engine in llama_cpp.FORMS else None,  # its log
            text=True,
            check=True,
            env=os.environ | {"TMPDIR": scratch},
        )
    return RaceResult(**json.loads(done.stdout.splitlines()[-1]))


def make_prompts(model: Path) -> list[list[int]]:
    """Prompts of the calibration text beside the model, or of the committed text, over and over."""
    from tokenizers import Tokenizer

    beside = model.with_name(model.name + ".calibration.txt")
    text = (beside if beside.exists() else TEXT).read_text()
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    stream = itertools.cycle(ids)
    return [list(itertools.islice(stream, PROMPT_TOKENS)) for _ in range(COLD_AND_WARM_PROMPTS)]


def rates(results: list[RaceResult], prompts: slice) -> tuple[list[float], list[float]]:
    """Prefill and decode in tokens/s of the chosen prompts of each process."""
    prefill = [PROMPT_TOKENS / s for r in results for s in r.prefill_s[prompts]]
    decode = [(DECODE_TOKENS - 1) / s for r in results for s in r.decode_s[prompts]]
    return prefill, decode


def report(results: dict[str, list[RaceResult]]) -> None:
    """The table: each engine's figure, and beside it how many times as much qchat reaches."""
    ours, *others = results.values()
    print("\n".join(ours[0].facts))
    names = [f"llama.cpp {name}" if name in llama_cpp.FORMS else name for name in results]
    print(f"{'':36}{names[0]:>9}" + "".join(f"{name:>22}" for name in names[1:]))
    cold, warm = slice(0, 1), slice(1, None)
    for label, prompts, pick in (
        ("first prompt, median", cold, statistics.median),
        ("warm, median", warm, statistics.median),
        ("warm, best", warm, max),
    ):
        measured = [rates(runs, prompts) for runs in results.values()]
        for what, column in (("prefill", 0), ("decode", 1)):
            row(f"{what} tokens/s, {label}", [pick(engine[column]) for engine in measured])
    loading = [statistics.median(run.load_s for run in runs) for runs in results.values()]
    row("import and load, median s", loading)
    row("peak memory, MiB", [max(r.peak_nbytes for r in runs) / MEBIBYTE for runs in results.values()])
    for name, runs in zip(names[1:], others, strict=True):
        if runs[0].ids:
            pairs = enumerate(zip(ours[0].ids, runs[0].ids, strict=True))
            agree = next((i for i, (a, b) in pairs if a != b), DECODE_TOKENS)
            print(f"greedy ids of the first prompt: {agree} of {DECODE_TOKENS} agree with {name}'s")


def row(label: str, values: list[float]) -> None:
    ours, *others = values
    print(f"{label:36}{ours:9.1f}" + "".join(f"{theirs:13.1f}{ours / theirs:8.2f}x" for theirs in others))


def main() -> None:
    parser = argparse.ArgumentParser(description="Race qchat against mlx-lm and llama.cpp on one model.")
    parser.add_argument("model", type=Path, nargs="?", default=QTINY, help=f"model folder (default {QTINY})")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each engine (default 3)")
    parser.add_argument("--engines", nargs="+", choices=WORKERS, default=[*WORKERS], help="default: all")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print("\n" + json.dumps(asdict(work(args.worker, args.model, json.load(sys.stdin)))))
        return
    print(
        f"{args.model.name}; load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )
    prompts = make_prompts(args.model)
    engines = ["qchat", *(name for name in args.engines if name != "qchat")]
    results: dict[str, list[RaceResult]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        forms = [name for name in engines if name in llama_cpp.FORMS]
        models = dict.fromkeys(engines, args.model)
        models |= {form: llama_cpp.convert(args.model, Path(folder), form) for form in forms}
        for _ in range(args.rounds):
            for engine, runs in results.items():
                runs.append(race(engine, models[engine], prompts))
    report(results)


if __name__ == "__main__":
    main()
