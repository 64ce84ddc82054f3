"""What a conversation reads, turn by turn, and what returning to one costs: `make bench-conversation`.

Prints the capitals conversation in both history modes, a cancelled turn and a retry, the time to reopen a
long conversation from disk against reading it, and the memory of many turns.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qchat.core import Session, Store
from qchat.core.conversation.transcript import History
from qchat.core.engine.engine import Engine
from qchat.core.events import Done, Event, Notice
from qchat.core.machine.backend import mx

CAPITALS = (
    "What is the capital of France?",
    "What about Germany?",
    "And Japan?",
    "Which of those three cities has the largest population?",
)
BRIEF: dict[str, Any] = {"max_new_tokens": 1, "enable_thinking": False}
SYSTEM = "You are a helpful assistant. Be concise."


def finished(events: Iterable[Event]) -> Done:
    *_, done = events
    if not isinstance(done, Done):
        raise TypeError("a reply ended without Done")
    return done


def row(label: str, done: Done) -> None:
    print(f"{label:34} {done.prompt_tokens:8} {done.cached_tokens:8} {done.prefilled_tokens:10}")


def capitals(engine: Engine, history: History, thinking: bool) -> None:
    session = Session(engine, SYSTEM, history=history, temperature=0, enable_thinking=thinking)
    for number, question in enumerate(CAPITALS, 1):
        row(f"{history}, {'thinking' if thinking else 'no thought'}, turn {number}", session.send(question))
        list(session.idle())
    row("  retry of turn 4", finished(session.retry()))
    events = session.stream("Tell me a story about a fox.")
    for _ in range(20):
        next(events)
    session.cancel()
    row("  turn 5, cancelled", finished(events))
    list(session.idle())
    row("  turn 6, after it", session.send("And now?"))


def reopening(engine: Engine, tokens: int) -> None:
    """Time from opening a stored conversation to the first token of its next reply: with its live state kept,
    with that state damaged, and with none; the best of three, for the machine may be busy."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "conversations.db") as store:
        session = Session(engine, store=store, **BRIEF)
        session.send("The quick brown fox jumps over the lazy dog. " * (tokens // 11))
        session.close()
        (state,) = store.states_folder.iterdir()
        print(f"\n{len(session.ids)} tokens, {state.stat().st_size / 2**20:.1f} MiB of state; first token:")
        kept = going_on("with it", engine, store)
        written = bytearray(state.read_bytes())
        written[len(written) // 2] ^= 1
        state.write_bytes(written)
        going_on("one byte flipped", engine, store)
        state.unlink()
        cold = going_on("without it", engine, store)
        print(f"  {cold / kept:.1f} times shorter")


def going_on(label: str, engine: Engine, store: Store) -> float:
    """Seconds, three times from the end of the only conversation."""
    (found,) = store.conversations()
    best, notice = float("inf"), ""
    for number in range(3):
        begun = time.perf_counter()
        session = Session.reopen(engine, store, found.id, **BRIEF)
        opened = time.perf_counter() - begun
        events = list(session.stream("And?"))
        done = finished(events)
        best = min(best, opened + done.performance.seconds_to_first_token)
        store.set_leaf(found.id, found.leaf)
        if not number:
            said = [e.text for e in events if isinstance(e, Notice) and "read again" in e.text]
            notice = "".join(said).replace(f"{store.states_folder}/", "")
            print(f"  {label:18} {done.prefilled_tokens:5} tokens read, ", end="")
    print(f"{best:7.3f} s  {notice}")
    return best


def memory(engine: Engine, turns: int) -> None:
    budget = 32 << 20
    session = Session(engine, max_new_tokens=2, enable_thinking=False, snapshot_budget=budget, seed=1)
    session.send("hi")  # whatever is kept for good, kernels and constants
    start, highest = mx.get_active_memory() - session.live.cache.nbytes, 0
    for _ in range(turns):
        session.send("hi")
        highest = max(highest, session.live.snapshots.nbytes)
    grown = (mx.get_active_memory() - start) / 2**20
    print(f"\n{turns} turns, {len(session.ids)} tokens: MLX holds {grown:.1f} MiB more; "
          f"snapshots at most {highest / 2**20:.1f} of {budget / 2**20:.0f} MiB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parents[2] / "shared/models/qtiny-24m"
    parser.add_argument("model", nargs="?", type=Path, default=default)
    engine = Engine.load(parser.parse_args().model)
    print(f"{'':34} {'prompt':>8} {'cached':>8} {'prefilled':>10}")
    for history in ("preserve", "strip"):
        for thinking in (False, True):
            capitals(engine, history, thinking)
    reopening(engine, min(1500, engine.config.max_position_embeddings - 64))
    memory(engine, min(200, engine.config.max_position_embeddings // 24))


if __name__ == "__main__":
    main()
