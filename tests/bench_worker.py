"""What the engine process costs: tokens/s through its pipe beside those of one process that does all itself.

`bench_worker.py [MODEL]`: the same reply here and there in turn, the fastest of each compared, which other
work on the machine disturbed least; a client reads every event. Exit code 1 where more than 5 % are lost.
"""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / ".dev")]

# ruff: noqa: E402
from qchat.core import BUILT_IN_MODEL, Session, load_session
from qchat.core.events import Done
from qchat.tui.chat.client import EngineClient

RUNS, TOKENS = 20, 128
LIMIT_PERCENT = 5.0
QUESTION = "Write a long story about a cat."
SETTINGS = {"temperature": 0.8, "seed": 3, "enable_thinking": False, "max_new_tokens": TOKENS}


def here(session: Session) -> float:
    """Tokens/s of a reply in this process."""
    session.reset()
    return session.send(QUESTION, **SETTINGS).performance.decode_tokens_per_s


async def there(client: EngineClient) -> float:
    """Tokens/s of the same reply through the pipe, by the same clock."""
    await client.request("reset")
    call = client.call("send", text=QUESTION, settings=SETTINGS)
    done = [event async for batch in call for event in batch][-1]
    assert isinstance(done, Done)
    return done.performance.decode_tokens_per_s


async def measure(model: str) -> Iterator[list[float]]:
    session, client = load_session(model), EngineClient()
    await client.start()
    try:
        await client.request("load", model=model)
        pairs = [(here(session), await there(client)) for _ in range(1 + RUNS)][1:]  # the first one warms up
    finally:
        await client.stop()
    return map(list, zip(*pairs, strict=True))


def main(model: str) -> int:
    """Measure and print; returns the exit code."""
    alone, served = map(max, asyncio.run(measure(model)))
    slower = 100 * (1 - served / alone)
    print(f"{alone:8.1f} tokens/s in one process")
    print(f"{served:8.1f} tokens/s through the engine process")
    print(f"{slower:8.1f} % slower, at most {LIMIT_PERCENT:.1f} %")
    return int(slower > LIMIT_PERCENT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else str(BUILT_IN_MODEL)))
