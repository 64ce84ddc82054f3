"""Memory of a conversation of many turns: qchat's session beside mlx-lm's chat, by MLX's own counters.

`python tests/peers/bench_turns.py [MODEL] [--turns 200] [--budget MiB]`. Each runs in a process of its own
and says the same things; mlx-lm as its chat command does it, with one prompt cache for the conversation,
which it can neither go back in nor bound.
"""

import argparse
import json
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QTINY = ROOT.parent / "shared/models/qtiny-24m"
MIB = 1 << 20
QUESTIONS = (
    "What is the capital of France?",
    "What about Germany?",
    "What is 17 + 25?",
    "Name three colours.",
    "And now?",
)
# what the templates make of a question, thinking off
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
MAX_TOKENS = 24
EVERY = 25
# both models are run beyond the context they were trained for, which costs sense but no memory
CONTEXT = 1 << 20


def with_qchat(model: Path, turns: int, budget: int) -> None:
    from dataclasses import replace

    from qchat.core import Session
    from qchat.core.engine.engine import Engine
    from qchat.core.machine.backend import mx

    engine = Engine.load(model)
    engine.model.config = replace(engine.config, max_position_embeddings=CONTEXT)
    engine.model.plan = None
    session = Session(engine, snapshot_budget=budget, max_new_tokens=MAX_TOKENS, temperature=0)
    for turn in range(1, turns + 1):
        session.send(QUESTIONS[turn % len(QUESTIONS)], enable_thinking=False)
        if turn % EVERY == 0 or turn == turns:
            report(
                turn,
                len(session.ids),
                mx.get_active_memory(),
                mx.get_peak_memory(),
                session.live.snapshots.nbytes,
            )


def with_mlx_lm(model: Path, turns: int) -> None:
    # by name: neither the runtime nor its type checker has this peer
    mx, peer = import_module("mlx.core"), import_module("mlx_lm")
    greedy = import_module("mlx_lm.sample_utils").make_sampler(0.0)
    network, tokenizer, *_ = peer.load(str(model))
    cache, tokens = import_module("mlx_lm.models.cache").make_prompt_cache(network), 0
    for turn in range(1, turns + 1):
        prompt = tokenizer.encode(PROMPT.format(QUESTIONS[turn % len(QUESTIONS)]))
        reply = peer.stream_generate(
            network, tokenizer, prompt, max_tokens=MAX_TOKENS, sampler=greedy, prompt_cache=cache
        )
        tokens += len(prompt) + sum(1 for _ in reply)
        if turn % EVERY == 0 or turn == turns:
            report(turn, tokens, mx.get_active_memory(), mx.get_peak_memory(), 0)


def report(turn: int, tokens: int, active: int, peak: int, snapshots: int) -> None:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = (turn, tokens, active / MIB, peak / MIB, snapshots / MIB, resident / MIB)
    print(json.dumps([round(figure, 1) for figure in figures]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=QTINY)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--budget", type=int, default=64, help="of qchat's snapshots, in MiB")
    parser.add_argument("--only", choices=("qchat", "mlx-lm"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / ".dev"))
    if args.only == "qchat":
        with_qchat(args.model, args.turns, args.budget * MIB)
        return 0
    if args.only == "mlx-lm":
        with_mlx_lm(args.model, args.turns)
        return 0
    print(f"{'':8}{'turn':>6}{'tokens':>9}{'active':>9}{'peak':>9}{'snapshots':>11}{'resident':>10}   (MiB)")
    for name in ("qchat", "mlx-lm"):
        command = [sys.executable, __file__, str(args.model), "--only", name]
        command += ["--turns", str(args.turns), "--budget", str(args.budget)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} failed: {(done.stderr.strip() or '?').splitlines()[-1]}", file=sys.stderr)
            return 1
        for line in done.stdout.splitlines():
            turn, tokens, active, peak, snapshots, resident = json.loads(line)
            print(
                f"{name:8}{turn:6.0f}{tokens:9.0f}{active:9.1f}{peak:9.1f}{snapshots:11.1f}{resident:10.1f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
