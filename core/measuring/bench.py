"""Speed of one model here: the capitals conversation, sustained decoding, prefill, waiting, memory.

Yields what is done as it goes, then a row of figures. Tokens/s, seconds and bytes; each decode speed also as
a share of what the machine's memory could give at best. Refuses nothing but what loading refuses.
"""

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
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

SYSTEM = "You are a helpful assistant. Be concise."
CAPITALS = (
    "What is the capital of France?",
    "What about Germany?",
    "And Japan?",
    "Which of those three cities has the largest population?",
)
RUNS = 3
SUSTAINED_TOKENS = 256
SPEEDS = 32  # of the sustained reply, for a sparkline
PREFILLS = (512, 4096, 32768)
PROMPT_TOKENS = 64  # before the sustained reply


@dataclass(frozen=True)
class Measured:
    """One model's figures: None for what its context does not hold, or what a random one cannot say.

    `capitals_tokens_per_s` is the best of turns 2 to 4, the median of the runs; `decode_tokens_per_s` that
    of SUSTAINED_TOKENS in a row. `bandwidth` is what a copy on this device moves, in bytes/s, and
    `bandwidth_share` what of it decoding reads in weights alone.
    """

    model: str
    path: str
    nbytes: int
    load_seconds: float
    capitals_tokens_per_s: float | None
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    prefills: dict[int, float | None]
    first_token_seconds: float | None
    cached_first_token_seconds: float | None
    peak_nbytes: int
    step_nbytes: int
    bandwidth: float
    speeds: list[float] = field(default_factory=list)

    @property
    def bandwidth_share(self) -> float:
        return self.step_nbytes * self.decode_tokens_per_s / self.bandwidth

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"bandwidth_share": self.bandwidth_share}


@dataclass(frozen=True)
class Progress:
    """`done` of `total` parts of one model's measurement; `detail` says which comes next."""

    done: int
    total: int
    detail: str


Steps = Generator[Progress, None, Measured]


def measure(folder: Path, runs: int = RUNS) -> Steps:
    """Load the model in `folder` and measure it `runs` times; returns its row. Raises as loading does."""
    total = 4 + runs
    yield Progress(0, total, "loading")
    begin = time.perf_counter()
    engine = Engine.load(folder)
    loaded = time.perf_counter() - begin
    if engine.precompiler is not None:
        engine.precompiler.wait()
    mx.reset_peak_memory()
    conversations = []
    for run in range(runs):
        yield Progress(1 + run, total, f"capitals, run {run + 1} of {runs}")
        conversations.append(hold_conversation(engine))
    yield Progress(1 + runs, total, f"decoding {SUSTAINED_TOKENS} tokens")
    ids = text_ids(engine, max(PREFILLS))
    speeds, decode = sustained(engine.model, ids)
    yield Progress(2 + runs, total, "reading prompts")
    prefills = {length: read_speed(engine.model, ids[:length], runs) for length in PREFILLS}
    yield Progress(3 + runs, total, "measuring the memory's bandwidth")
    return Measured(
        model=engine.name,
        path=str(folder),
        nbytes=engine.model.nbytes,
        load_seconds=loaded,
        capitals_tokens_per_s=statistics.median(map(best_of_turns, conversations)),
        decode_tokens_per_s=decode,
        prefill_tokens_per_s=next((speed for speed in prefills.values() if speed is not None), 0.0),
        prefills=prefills,
        first_token_seconds=conversations[0][0].performance.seconds_to_first_token,
        cached_first_token_seconds=statistics.median(
            done.performance.seconds_to_first_token for turns in conversations for done in turns[1:]
        ),
        peak_nbytes=mx.get_peak_memory(),
        step_nbytes=engine.model.step_nbytes,
        bandwidth=copy_bandwidth(),
        speeds=speeds,
    )


def measure_random(config: ModelConfig, variant: str, runs: int = RUNS) -> Steps:
    """Make a model of `config` with random weights, packed as the published `variant`, and measure what does
    not depend on what it says. Raises UsageError for an unknown variant and for what cannot be packed so."""
    if variant not in VARIANTS:
        raise UsageError(f"there is no variant {variant!r:.40}; known are {', '.join(VARIANTS)}")
    options = replace(VARIANTS[variant], keep_bf16=True)
    if config.mtp_num_hidden_layers:
        options = replace(options, mtp="drop")
    yield Progress(0, 4, "making weights")
    begin = time.perf_counter()
    model = random_model(config, options)
    made = time.perf_counter() - begin
    mx.reset_peak_memory()
    yield Progress(1, 4, f"decoding {SUSTAINED_TOKENS} tokens")
    ids = [(7919 * i) % config.vocab_size for i in range(max(PREFILLS))]
    speeds, decode = sustained(model, ids)
    yield Progress(2, 4, "reading prompts")
    prefills = {length: read_speed(model, ids[:length], runs) for length in PREFILLS}
    yield Progress(3, 4, "measuring the memory's bandwidth")
    return Measured(
        model=f"random {variant}",
        path=config.source,
        nbytes=model.nbytes,
        load_seconds=made,
        capitals_tokens_per_s=None,
        decode_tokens_per_s=decode,
        prefill_tokens_per_s=next((speed for speed in prefills.values() if speed is not None), 0.0),
        prefills=prefills,
        first_token_seconds=None,
        cached_first_token_seconds=None,
        peak_nbytes=mx.get_peak_memory(),
        step_nbytes=model.step_nbytes,
        bandwidth=copy_bandwidth(),
        speeds=speeds,
    )


def hold_conversation(engine: Engine) -> list[Done]:
    """The four questions about capitals, one after another."""
    session = Session(engine, SYSTEM, temperature=0.6, enable_thinking=False)
    return [session.send(question) for question in CAPITALS]


def best_of_turns(turns: Sequence[Done]) -> float:
    """The fastest decode of turns 2 to 4; the first pays for what is new."""
    return max(done.performance.decode_tokens_per_s for done in turns[1:])


def sustained(model: Model, ids: Sequence[int]) -> tuple[list[float], float]:
    """Greedy decoding after the first of `ids`, past any stop token: SPEEDS speeds along the way, and the
    speed of all of it."""
    cache = model.new_cache()
    for _ in prefill(model, cache, ids[:PROMPT_TOKENS]):
        pass
    decoder = Decoder(model, cache, Sampling(temperature=0))
    decoder.next()
    piece = SUSTAINED_TOKENS // SPEEDS
    times = [time.perf_counter()]
    for _ in range(SPEEDS):
        for _ in range(piece):
            decoder.next()
        times.append(time.perf_counter())
    speeds = [piece / (after - before) for before, after in pairwise(times)]
    return speeds, SUSTAINED_TOKENS / (times[-1] - times[0])


def read_speed(model: Model, ids: Sequence[int], runs: int) -> float | None:
    """Tokens/s of reading `ids`, the median of the runs after a first one that warms up."""
    if len(ids) >= model.context:
        return None
    return len(ids) / statistics.median([_timed(lambda: _read(model, ids)) for _ in range(1 + runs)][1:])


def _read(model: Model, ids: Sequence[int]) -> None:
    cache = model.new_cache()
    for _ in prefill(model, cache, ids):
        pass


def _timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def text_ids(engine: Engine, length: int) -> list[int]:
    """The first `length` ids of the packaged texts, over and over."""
    ids = engine.tokenizer.encode("\n\n".join(packaged_texts().values()), special=False)
    return (ids * (length // len(ids) + 1))[:length]
