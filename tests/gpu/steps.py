"""Where the time of decoding one token goes: building the step, handing it to the device, waiting for it.

`PYTHONPATH=.dev python tests/gpu/steps.py CONFIG.json UD-Q2_K_XL`: medians in ms over STEPS steps of a random
model, after a prompt of 512 tokens. A step that never waits is bounded by the host.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

from qchat.core.generation.decode import prefill
from qchat.core.generation.sampling import Sampling, initial_state, make_sampler
from qchat.core.machine.backend import mx
from qchat.core.measuring.random_model import random_model
from qchat.core.quant.plan import load_config
from qchat.core.quant.recipes import VARIANTS

PROMPT, WARM_UP, STEPS = 512, 10, 150
GREEDY = Sampling(temperature=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the parts of a step.")
    parser.add_argument("config", type=Path)
    parser.add_argument("variant", choices=VARIANTS)
    args = parser.parse_args()
    config = load_config(args.config)
    model = random_model(config, replace(VARIANTS[args.variant], keep_bf16=True, mtp="drop"))
    cache, sample = model.new_cache(), make_sampler(GREEDY)
    for _ in prefill(model, cache, [(7 * i * i + 3 * i) % 5000 for i in range(PROMPT)]):
        pass
    state = initial_state(GREEDY, config.vocab_size)
    token = mx.array(1, mx.uint32)
    times: list[list[float]] = []
    for _ in range(WARM_UP + STEPS):
        clock = [time.perf_counter()]
        after, state = sample(model.logits(model.hidden(token[None], cache))[-1], state)
        clock.append(time.perf_counter())
        mx.async_eval(after)
        clock.append(time.perf_counter())
        int(token)
        clock.append(time.perf_counter())
        token = after
        times.append(
            [1e3 * (b - a) for a, b in zip([*clock[:3], clock[0]], [*clock[1:], clock[3]], strict=True)]
        )
    build, hand, wait, whole = (statistics.median(part) for part in zip(*times[WARM_UP:], strict=True))
    mean = statistics.mean(part[3] for part in times[WARM_UP:])
    print(
        f"{args.config.name} {args.variant}: build {build:.2f}, hand out {hand:.2f}, wait {wait:.2f}, "
        f"in all {whole:.2f} ms, on average {mean:.2f}"
    )


if __name__ == "__main__":
    main()
