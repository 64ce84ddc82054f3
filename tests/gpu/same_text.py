"""Greedy replies on this device against those of another, prompt by prompt; where they part, by how little.

`PYTHONPATH=.dev python tests/gpu/same_text.py MODEL FILE` writes FILE where it does not exist (on the CPU),
and compares with it where it does (on the GPU). Ends with exit code 1 if two ids differ that were no tie.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from qchat.core.engine.engine import Engine
from qchat.core.generation.decode import Decoder, prefill
from qchat.core.generation.sampling import Sampling

TEXT = Path(__file__).parents[1] / "golden/text.txt"
PROMPTS, PROMPT_TOKENS, TOKENS = 100, 32, 48
# products end in bfloat16, whose relative step is 2^-7 at most: two logits are a tie if each may be one off
TIE = 2**-6


def prompts(engine: Engine) -> Iterator[list[int]]:
    """Pieces of one text that begin at different places."""
    ids = engine.tokenizer.encode(TEXT.read_text())
    step = (len(ids) - PROMPT_TOKENS) // PROMPTS
    return (ids[i * step : i * step + PROMPT_TOKENS] for i in range(PROMPTS))


def reply(engine: Engine, prompt: list[int]) -> list[int]:
    cache = engine.model.new_cache()
    for _ in prefill(engine.model, cache, prompt):
        pass
    decoder = Decoder(engine.model, cache, Sampling(temperature=0))
    return [decoder.next() for _ in range(TOKENS)]


def gap(engine: Engine, ids: list[int], one: int, other: int) -> float:
    """How far apart the logits of two ids are after `ids`, as a share of the larger one."""
    logits = engine.logits(ids)[-1]
    pair = [abs(float(logits[id])) for id in (one, other)]
    return abs(float(logits[one] - logits[other])) / max(*pair, 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare greedy replies of two devices.")
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    engine = Engine.load(args.model)
    given = list(prompts(engine))
    replies = [reply(engine, prompt) for prompt in given]
    if not args.file.exists():
        args.file.write_text(json.dumps(replies))
        print(f"wrote {PROMPTS} replies of {TOKENS} ids to {args.file}")
        return 0
    same, worst = 0, 0.0
    for number, (prompt, ours, theirs) in enumerate(
        zip(given, replies, json.loads(args.file.read_text()), strict=True)
    ):
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if place is None:
            same += 1
            continue
        between = gap(engine, prompt + ours[:place], ours[place], theirs[place])
        worst = max(worst, between)
        print(f"prompt {number}: ids {ours[place]} and {theirs[place]} at {place}, {between:.2%} apart")
    print(f"{same} of {PROMPTS} replies are the same; where they part, logits are {worst:.2%} apart at most")
    return int(worst > TIE)


if __name__ == "__main__":
    sys.exit(main())
