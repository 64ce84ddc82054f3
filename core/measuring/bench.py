"""Speed of a model on this machine: a short conversation, sustained decoding, prefill, latency, memory.

Runs as a generator that yields each step and returns the figures, in tokens/s, seconds and bytes. The decode
speed is also given as a share of the memory bandwidth. Refuses only what loading refuses.
"""

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig
from ..conversation.session import Session
from ..engine.engine import Engine
from ..errors import UsageError
from ..events import Done
from ..generation.decode import Decoder, prefill
from ..generation.sampling import Sampling
from ..machine.backend import mx
from ..machine.device import copy_bandwidth
from ..model.network import Model
from ..quant.recipes import VARIANTS
from .evaluate import packaged_texts
from .random_model import random_model
from .results import BenchResult

SYSTEM = "You are a helpful assistant. Be concise."
CAPITALS = (
    "What is the capital of France?",
    "What about Germany?",
    "And Japan?",
    "Which of those three cities has the largest population?",
)
RUNS = 3
SUSTAINED_TOKENS = 256
SPEED_SAMPLES = 32  # samples along the sustained reply, for a sparkline
PREFILL_LENGTHS = (512, 4096, 32768)
PROMPT_TOKENS = 64  # before the measure_decoding reply


@dataclass(frozen=True)
class BenchStep:
    """Progress: `done` of `total` steps of a run; `detail` describes the next one."""

    done: int
    total: int
    detail: str


# yields its steps and returns the result
BenchRun = Generator[BenchStep, None, BenchResult]


def measure(folder: Path, runs: int = RUNS) -> BenchRun:
    """Load the model in `folder` and measure it `runs` times; returns medians. Raises as loading does."""
    total = 4 + runs
    yield BenchStep(0, total, "loading")
    begin = time.perf_counter()
    engine = Engine.load(folder)
    load_seconds = time.perf_counter() - begin
    if engine.precompiler is not None:
        engine.precompiler.wait()
    mx.reset_peak_memory()
    conversations = []
    for run in range(runs):
        yield BenchStep(1 + run, total, f"capitals, run {run + 1} of {runs}")
        conversations.append(hold_conversation(engine))
    ids = packaged_ids(engine, max(PREFILL_LENGTHS))
    speeds = yield from _measure_speeds(engine.model, ids, runs, done=1 + runs, total=total)
    return BenchResult(
        model=engine.name,
        path=str(folder),
        load_seconds=load_seconds,
        capitals_tokens_per_s=statistics.median(map(fastest_turn, conversations)),
        first_token_seconds=conversations[0][0].performance.seconds_to_first_token,
        cached_first_token_seconds=statistics.median(
            done.performance.seconds_to_first_token for turns in conversations for done in turns[1:]
        ),
        **speeds,
    )


def measure_random(config: ModelConfig, variant: str, runs: int = RUNS) -> BenchRun:
    """Measure a model of `config` with random weights, packed like the published `variant`.

    Leaves out the conversation. Raises UsageError for an unknown variant, or a config that it does not fit.
    """
    if variant not in VARIANTS:
        raise UsageError(f"there is no variant {variant!r:.40}; known are {', '.join(VARIANTS)}")
    options = replace(VARIANTS[variant], keep_bf16=True)
    if config.mtp_num_hidden_layers:
        options = replace(options, mtp="drop")
    yield BenchStep(0, 4, "making weights")
    begin = time.perf_counter()
    model = random_model(config, options)
    load_seconds = time.perf_counter() - begin
    mx.reset_peak_memory()
    ids = [(7919 * i) % config.vocab_size for i in range(max(PREFILL_LENGTHS))]
    speeds = yield from _measure_speeds(model, ids, runs, done=1, total=4)
    return BenchResult(
        model=f"random {variant}",
        path=config.source,
        load_seconds=load_seconds,
        capitals_tokens_per_s=None,
        first_token_seconds=None,
        cached_first_token_seconds=None,
        **speeds,
    )


def _measure_speeds(
    model: Model, ids: Sequence[int], runs: int, *, done: int, total: int
) -> Generator[BenchStep, None, dict[str, Any]]:
    """Measure decoding, prefill, memory and bandwidth; returns these fields of `BenchResult`."""
    yield BenchStep(done, total, f"decoding {SUSTAINED_TOKENS} tokens")
    speeds, decode = measure_decoding(model, ids)
    yield BenchStep(done + 1, total, "reading prompts")
    prefills = {length: measure_prefill(model, ids[:length], runs) for length in PREFILL_LENGTHS}
    yield BenchStep(done + 2, total, "measuring the memory bandwidth")
    return {
        "nbytes": model.nbytes,
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": next((speed for speed in prefills.values() if speed is not None), 0.0),
        "prefills": prefills,
        "peak_nbytes": mx.get_peak_memory(),
        "step_nbytes": model.step_nbytes,
        "bandwidth": copy_bandwidth(),
        "speeds": speeds,
    }


def hold_conversation(engine: Engine) -> list[Done]:
    """Ask the four questions about capitals in one session."""
    session = Session(engine, SYSTEM, temperature=0.6, enable_thinking=False)
    return [session.send(question) for question in CAPITALS]


def fastest_turn(turns: Sequence[Done]) -> float:
    """Return the fastest decode speed of turns 2 to 4; the first includes warming up."""
    return max(done.performance.decode_tokens_per_s for done in turns[1:])


def measure_decoding(model: Model, ids: Sequence[int]) -> tuple[list[float], float]:
    """Decode greedily after the first PROMPT_TOKENS of `ids`, past any stop token.

    Returns SPEED_SAMPLES speeds along the way, and the overall speed, in tokens/s.
    """
    cache = model.new_cache()
    for _ in prefill(model, cache, ids[:PROMPT_TOKENS]):
        pass
    decoder = Decoder(model, cache, Sampling(temperature=0))
    decoder.next()
    piece = SUSTAINED_TOKENS // SPEED_SAMPLES
    times = [time.perf_counter()]
    for _ in range(SPEED_SAMPLES):
        for _ in range(piece):
            decoder.next()
        times.append(time.perf_counter())
    speeds = [piece / (after - before) for before, after in pairwise(times)]
    return speeds, SUSTAINED_TOKENS / (times[-1] - times[0])


def measure_prefill(model: Model, ids: Sequence[int], runs: int) -> float | None:
    """Return the tokens/s of reading `ids`, the median of `runs` after a warm-up; None if they do not fit."""
    if len(ids) >= model.context:
        return None
    seconds = [_measure_seconds(lambda: _prefill_all(model, ids)) for _ in range(1 + runs)]
    return len(ids) / statistics.median(seconds[1:])


def _prefill_all(model: Model, ids: Sequence[int]) -> None:
    cache = model.new_cache()
    for _ in prefill(model, cache, ids):
        pass


def _measure_seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def packaged_ids(engine: Engine, length: int) -> list[int]:
    """Return `length` ids of the packaged texts, repeated as needed."""
    ids = engine.tokenizer.encode("\n\n".join(packaged_texts().values()), special=False)
    return (ids * (length // len(ids) + 1))[:length]
