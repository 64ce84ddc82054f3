"""Tokens/s of a reply that rewrites a file of its prompt, with and without drafts, by the share copied.

`make bench-drafts`, or `PYTHONPATH=.dev:. python tests/bench_drafts.py [MODEL]`. The model computes every
step; only the ids that it draws are replaced by those of a script, so that the copied share is exact. Exits
with 1 where 80 % are copied and drafts are not at least 1.5 times as fast. `--busy` is for a machine that has
other work, too: one thread computes, and all times are those of the processor spent on it.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# the decode step in C from the start, as after the first seconds of a chat
os.environ.setdefault("QCHAT_NATIVE", "on")
if "--busy" in sys.argv:
    os.environ |= {"QCHAT_NATIVE_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

from qchat.core import BUILT_IN_MODEL
from qchat.core.engine.engine import Engine
from qchat.core.generation.copy_drafts import CopyDrafts
from qchat.core.generation.decode import AnyDecoder, Decoder, prefill
from qchat.core.generation.draft_gate import MAX_DRAFTS
from qchat.core.generation.sampling import SamplerState, Sampling
from qchat.core.generation.speculate import DraftMemory, SpeculativeDecoder
from qchat.core.generation.verification import Draft, Verifier
from qchat.core.machine.backend import mx
from qchat.core.model.cache import Cache
from tests.paths import QTINY, ROOT

CLOCK = time.process_time if "--busy" in sys.argv else time.perf_counter
FILE_TOKENS, REPEATS = 600, 5
# a change of a line or two in each so many ids
SPAN = 50
SHARES = (0.0, 0.5, 0.8, 0.95)
WANTED_SHARE, WANTED_RATIO = 0.8, 1.5
GREEDY = Sampling(temperature=0)


class ScriptedVerifier(Verifier):
    """Draws the ids of a script, whatever the logits say; the key of a state is a place in it."""

    def __init__(self, ids: Sequence[int]):
        super().__init__(GREEDY)
        self._ids = mx.array(list(ids), mx.uint32)

    def verify(
        self, logits: mx.array, state: SamplerState, drafts: Sequence[Draft] = ()
    ) -> tuple[mx.array, list[SamplerState]]:
        del drafts
        place, count = int(state.key), len(logits)
        ids = self._ids[place : place + count] + 0 * logits.argmax(axis=-1).astype(mx.uint32)
        return ids, [SamplerState(mx.array(place + row + 1), None) for row in range(count)]

    def sample(self, logits: mx.array, state: SamplerState) -> tuple[mx.array, SamplerState]:
        """Draw one id, as `decode.Decoder` does."""
        ids, states = self.verify(logits[None], state)
        return ids[0], states[0]


class ScriptedDecoder(Decoder):
    def __init__(self, engine: Engine, cache: Cache, script: ScriptedVerifier):
        super().__init__(engine.model, cache, GREEDY)
        self._sample = script.sample
        token, self._state_before = script.sample(self._logits, SamplerState(mx.array(0), None))
        self.force(int(token))


class ScriptedDrafts(SpeculativeDecoder):
    def __init__(self, engine: Engine, cache: Cache, script: ScriptedVerifier, prompt: list[int]):
        super().__init__(engine.model, cache, GREEDY, memory=DraftMemory(CopyDrafts(prompt)), clock=CLOCK)
        self._verifier = script
        drawn, states = script.verify(self._logits, SamplerState(mx.array(0), None))
        self._drawn, self._states = [drawn[0]], [SamplerState(mx.array(0), None), *states]


def rewritten(ids: list[int], share: float, vocabulary: int) -> list[int]:
    """Return `ids` with random ones at the end of each span, so that `share` of them is copied."""
    draw, kept = random.Random(1), round(SPAN * share)
    return [id if place % SPAN < kept else draw.randrange(vocabulary) for place, id in enumerate(ids)]


def tokens_per_s(
    engine: Engine, prompt: list[int], count: int, make: Callable[[Cache], AnyDecoder]
) -> tuple[float, AnyDecoder]:
    cache = engine.model.new_cache()
    for _ in prefill(engine.model, cache, prompt, drafts=True):
        pass
    decoder = make(cache)
    decoder.next()
    begin = CLOCK()
    for _ in range(count - 1):
        decoder.next()
    return (count - 1) / (CLOCK() - begin), decoder


def main() -> int:
    default = QTINY if QTINY.is_dir() else BUILT_IN_MODEL
    parser = argparse.ArgumentParser(description="Time drafts on a reply that rewrites a file.")
    parser.add_argument("model", type=Path, nargs="?", default=default)
    parser.add_argument("--busy", action="store_true", help="one thread, and times of the processor")
    engine = Engine.load(parser.parse_args().model)
    file = engine.tokenizer.encode((ROOT / "core/model/network.py").read_text())[:FILE_TOKENS]
    prompt = [*file, *engine.tokenizer.encode("\n\nWrite this file again with the changes made.\n")]
    print(f"a file of {len(file)} tokens; {REPEATS} runs each, of which the median counts")
    ratios = {share: race(engine, file, prompt, share) for share in SHARES}
    return 0 if ratios[WANTED_SHARE] >= WANTED_RATIO else 1


def race(engine: Engine, file: list[int], prompt: list[int], share: float) -> float:
    """Print tokens/s without and with drafts where `share` of the file is copied; return their ratio."""
    ids = rewritten(file, share, engine.model.config.vocab_size)
    script = ScriptedVerifier([*ids, *[0] * MAX_DRAFTS * 2])

    def plainly(cache: Cache) -> AnyDecoder:
        return ScriptedDecoder(engine, cache, script)

    def with_drafts(cache: Cache) -> AnyDecoder:
        return ScriptedDrafts(engine, cache, script, prompt)

    runs = [
        [tokens_per_s(engine, prompt, len(file), make) for make in (plainly, with_drafts)]
        for _ in range(REPEATS)
    ]
    plain, drafted = (statistics.median(speed for speed, _ in column) for column in zip(*runs, strict=True))
    # other work slows a run and the next one alike
    ratio = statistics.median(after / before for (before, _), (after, _) in runs)
    figures = runs[-1][1][1].figures
    print(
        f"{share:4.0%} copied: {plain:6.1f} tokens/s without drafts, {drafted:6.1f} with, "
        f"ratio {ratio:.2f}; {figures.share or 0:.0%} accepted, "
        f"cost {figures.cost or 0:.2f}, gain {figures.gain or 0:.2f}"
    )
    return ratio


if __name__ == "__main__":
    sys.exit(main())
