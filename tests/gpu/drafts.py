"""Tokens/s of random models at true dimensions with and without drafts, at forced acceptance.

`PYTHONPATH=.dev:. python tests/gpu/drafts.py CONFIG.json... --variants UD-Q4_K_XL`. Drafts of a random draft
head are never right, so each is accepted by chance: the time of a step is real, the acceptance is not. Copies
are of a context in which every place matches. `fixed` tries the most drafts in every step, `gate` as many as
the gate finds to pay; `none` is `decode.Decoder`.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qchat.core.generation.copy_drafts import CopyDrafts
from qchat.core.generation.decode import AnyDecoder, Decoder, prefill
from qchat.core.generation.draft_gate import COUNTS, Choice, DraftGate, Source
from qchat.core.generation.sampling import Sampling
from qchat.core.generation.speculate import DraftMemory, SpeculativeDecoder
from qchat.core.measuring.random_model import random_model
from qchat.core.model.network import Model
from qchat.core.quant.plan import load_config
from qchat.core.quant.recipes import VARIANTS

PROMPT, WARM_UP, TOKENS, REPEATS = 512, 96, 128, 3
GREEDY = Sampling(temperature=0)
SOURCES: dict[str, Source] = {"head": "head", "copy": "long copy"}


class ForcedAcceptance(SpeculativeDecoder):
    """Accepts each draft with the same chance."""

    def __init__(self, model: Model, chance: float, memory: DraftMemory):
        cache = model.new_cache()
        for _ in prefill(model, cache, [(7 * i * i + 3 * i) % 5000 for i in range(PROMPT)], drafts=True):
            pass
        super().__init__(model, cache, GREEDY, memory=memory)
        self._chance, self._random = chance, random.Random(1)

    def _count_accepted(self, drafts: list[int], drawn: list[int]) -> int:
        del drawn
        accepted = itertools.takewhile(lambda _: self._random.random() < self._chance, drafts)
        return sum(1 for _ in accepted)


class Matched(CopyDrafts):
    """A context in which every place has a long match."""

    def add(self, id: int) -> None:
        del id
        self.matched = 64

    def proposal(self, count: int) -> list[int]:
        return list(range(1, count + 1))


class OneSource(DraftGate):
    """Chooses among the numbers of one source; with `fixed`, that number in every step."""

    def __init__(self, source: Source, fixed: int):
        super().__init__()
        self._source, self._fixed = source, fixed

    def choose(self, source: Source, limit: int) -> Choice:
        if source != self._source or self._plain.count < 2:
            return Choice()
        return Choice(self._fixed, speed=2.0) if self._fixed else super().choose(source, limit)


def plainly(model: Model) -> Decoder:
    cache = model.new_cache()
    for _ in prefill(model, cache, [(7 * i * i + 3 * i) % 5000 for i in range(PROMPT)]):
        pass
    return Decoder(model, cache, GREEDY)


def with_drafts(model: Model, source: Source, fixed: int, chance: float) -> ForcedAcceptance:
    copies = Matched([0]) if source != "head" else CopyDrafts()
    return ForcedAcceptance(model, chance, DraftMemory(copies, OneSource(source, fixed)))


def speed(decoder: AnyDecoder) -> float:
    """Tokens/s of the best of REPEATS stretches, after kernels are compiled and the gate has learned."""
    times = []
    for count in [WARM_UP, *[TOKENS] * REPEATS]:
        began = time.perf_counter()
        for _ in range(count):
            decoder.next()
        times.append((time.perf_counter() - began) / count)
    return 1 / min(times[1:])


def rows(model: Model, chances: list[float], sources: list[str]) -> Iterator[str]:
    plain = speed(plainly(model))
    yield f"none: {plain:.1f} tokens/s"
    for name, chance in itertools.product(sources, chances):
        source = SOURCES[name]
        parts = []
        for fixed in (*COUNTS[source], 0):
            decoder = with_drafts(model, source, fixed, chance)
            found = speed(decoder)
            label = f"{fixed} drafts" if fixed else "gate"
            parts.append(f"{label} {found:.1f} ({found / plain:.2f}, step {decoder.figures.cost or 1:.2f})")
        yield f"{name} at {chance}: " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time drafts at forced acceptance on this GPU.")
    parser.add_argument("configs", type=Path, nargs="+", help="config.json files, NAME.config.json")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["UD-Q4_K_XL"])
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    args = parser.parse_args()
    for path, variant in itertools.product(args.configs, args.variants):
        model = random_model(load_config(path), replace(VARIANTS[variant], mtp="keep"))
        print(f"{path.name} {variant}", flush=True)
        for row in rows(model, args.acceptance, args.sources):
            print(f"  {row}", flush=True)
        del model


if __name__ == "__main__":
    main()
