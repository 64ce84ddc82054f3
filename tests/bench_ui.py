"""What the screens cost, beside their budgets: `bench_ui.py [NAME...]`; exit code 1 where one is broken.

Times are processor time of this process, painting included. A budget is a function below `@budget`, which
yields rows; each runs in a process of its own, so that none warms another.
"""

import asyncio
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1] / ".dev"), str(Path(__file__).parents[1])]

# ruff: noqa: E402
from textual.app import App, ComposeResult
from textual.events import AppBlur, AppFocus, Key, Resize
from textual.geometry import Size

from qchat.core.conversation.summary import ConversationState, Turn, TurnStats
from qchat.core.events import Performance, Text, Thought
from qchat.tui.chat.turns import NO_STATE
from qchat.tui.user import themes
from qchat.tui.widgets.transcript.transcript import Transcript
from tests import app_probe
from tests.tui.running_app import running

# with bytecode, as an installed program has it: compiling the sources costs more than everything else
BYTECODE = tempfile.TemporaryDirectory(prefix="qchat-bytecode-")
PACKAGE = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    "PYTHONPATH": str(Path(__file__).parents[1] / ".dev"),
    "PYTHONPYCACHEPREFIX": BYTECODE.name,
}
TURNS = 2_000
TOKENS, TOKENS_PER_S = 480, 60
SIZE, PANES_SIZE = (100, 30), (160, 45)
RUNS = 3  # of each side, of which the best count


class Cost(NamedTuple):
    """One measured quantity; `value` must not exceed `limit`."""

    what: str
    limit: float
    value: float
    unit: str


Budget = Callable[[], AsyncIterator[Cost]]
BUDGETS: dict[str, Budget] = {}


def budget(measure: Budget) -> Budget:
    """Register a budget under its function's name."""
    BUDGETS[measure.__name__] = measure
    return measure


# --- texts ---

SENTENCE = (
    "Merge sort is a **divide and conquer** algorithm with `O(n log n)` time; it *always* splits in two. "
)
PROSE = "\n\n".join(SENTENCE * 4 for _ in range(40))
LIST = "\n".join(
    f"- item {n}: splits the list in two halves, **recursively**, and merges" for n in range(400)
)
CODE = "```python\n" + "def merge(xs: list[int], n: int = 0) -> list[int]:\n    return xs  # step\n\n" * 200
TABLE = "| name | size | speed |\n|---|--:|---|\n" + "| Qwen3.6-27B | 11.1 GB | `23.4` tok/s |\n" * 300
THOUGHT = "The user wants merge sort. Let me think about how it splits.\n" * 200
ANSWER = (
    f"## Merge sort\n\n{SENTENCE * 3}\n\n"
    + "\n".join(LIST.split("\n")[:6])
    + "\n\n"
    + CODE[:300]
    + "\n```\n\nDone."
)


def tokens(text: str) -> list[str]:
    """Pieces of about the length that a tokenizer makes."""
    return re.findall(r"\s*\S{1,5}|\s+", text)[:TOKENS]


def turn(number: int) -> Turn:
    return Turn(
        number=number,
        role="user",
        question=f"Question {number}: explain merge sort with code, and say why",
        thinking=THOUGHT[:400],
        answer=ANSWER,
        tool_calls=(),
        finish_reason="stop",
        node=number,
        siblings=(number,),
        stats=TurnStats(reasoning_tokens=212, performance=Performance(seconds_thinking=4.1)),
        created=1.7e9 + number,
    )


def conversation(turns: int) -> ConversationState:
    return replace(NO_STATE, conversation=1, turns=tuple(turn(number + 1) for number in range(turns)))


# --- the stage ---


class ThemedTranscript(App[None]):
    """The transcript alone on a screen, with our themes."""

    def __init__(self) -> None:
        super().__init__()
        for look in themes.Shelf.open().looks.values():
            self.register_theme(look.theme)
        self.theme = "night"

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return themes.extra_defaults()

    def compose(self) -> ComposeResult:
        yield Transcript()


@asynccontextmanager
async def stage(turns: int = 0) -> AsyncIterator[tuple[ThemedTranscript, Transcript]]:
    app = ThemedTranscript()
    async with app.run_test(size=SIZE):
        transcript = app.query_one(Transcript)
        transcript.focus()
        if turns:
            transcript.show(conversation(turns))
        await painted(app)
        gc.collect()
        gc.freeze()  # as the app does after its first paint
        yield app, transcript


async def painted(app: App) -> None:
    """Until all that was asked for is on the screen."""
    for pump in (app, app.screen, app, app.screen, app.screen):
        done = asyncio.Event()
        pump.call_after_refresh(done.set)
        await done.wait()


async def cost(app: App, change: Callable[[], Any], times: int = 1) -> float:
    """Milliseconds that `change` and its painting take, the median of several."""
    measured = []
    for _ in range(times):
        began = time.process_time()
        change()
        await painted(app)
        measured.append(time.process_time() - began)
    return 1e3 * sorted(measured)[len(measured) // 2]


# --- budgets ---


async def streamed(kind: str, text: str, limit: float) -> AsyncIterator[Cost]:
    """A reply at 60 tokens/s, each token an event of its own, as an answer and as an open thought."""
    async with stage(20) as (app, transcript):
        transcript.add_question(turn(21))
        transcript.begin_answer(turn(21))
        late: list[float] = []
        watch = asyncio.create_task(watched(late))
        event = Thought if kind == "thought" else Text
        pieces, began, clock = tokens(text), time.process_time(), time.perf_counter()
        for number, token in enumerate(pieces):
            transcript.feed([event(token)])
            await asyncio.sleep(max(0, clock + (number + 1) / TOKENS_PER_S - time.perf_counter()))
        await painted(app)
        spent = time.process_time() - began
        watch.cancel()
        late.sort()
        yield Cost(f"streaming {kind}, each token", limit, 1e3 * spent / len(pieces), "ms")
        yield Cost(f"streaming {kind}, share of a core", 15, 100 * spent * TOKENS_PER_S / len(pieces), "%")
        yield Cost(f"streaming {kind}, loop blocked, p95", 20, 1e3 * late[int(len(late) * 0.95)], "ms")
        yield Cost(f"streaming {kind}, loop blocked, most", 60, 1e3 * late[-1], "ms")


async def watched(late: list[float]) -> None:
    """The work done between one look in and the next; other processes do not count."""
    while True:
        began = time.thread_time()
        await asyncio.sleep(0.005)
        late.append(time.thread_time() - began)


@budget
async def prose() -> AsyncIterator[Cost]:
    async for row in streamed("prose", PROSE, 5):
        yield row


@budget
async def bullets() -> AsyncIterator[Cost]:
    async for row in streamed("list", LIST, 5):
        yield row


@budget
async def code() -> AsyncIterator[Cost]:
    async for row in streamed("code", CODE, 12):
        yield row


@budget
async def table() -> AsyncIterator[Cost]:
    async for row in streamed("table", TABLE, 16):
        yield row


@budget
async def thought() -> AsyncIterator[Cost]:
    async for row in streamed("thought", THOUGHT, 5):
        yield row


@budget
async def long_conversation() -> AsyncIterator[Cost]:
    """2,000 turns: what opening, scrolling and changes of the whole screen cost."""
    async with stage() as (app, transcript):
        state = conversation(TURNS)
        opening = await cost(app, lambda: transcript.show(state))
        yield Cost("load 2,000 turns, first paint", 500, opening, "ms")
        transcript.scroll_to(y=transcript.virtual_size.height // 2, animate=False)
        await painted(app)
        up = await cost(app, lambda: transcript.scroll_relative(y=-5, animate=False), 40)
        yield Cost("scroll 5 lines", 12, up, "ms")
        yield Cost(
            "scroll a page", 20, await cost(app, lambda: transcript.scroll_page_up(animate=False), 20), "ms"
        )
        yield Cost(
            "block cursor to the next", 16, await cost(app, lambda: transcript.action_step(1), 20), "ms"
        )
        events = iter([AppBlur(), AppFocus()] * 5)
        yield Cost(
            "focus lost or gained", 20, await cost(app, lambda: app.post_message(next(events)), 10), "ms"
        )
        names = iter(["day", "night"] * 3)
        yield Cost("theme change", 60, await cost(app, lambda: setattr(app, "theme", next(names)), 5), "ms")
        yield Cost("width change", 100, await resizing(app, transcript), "ms")
        yield Cost("find in 2,000 turns", 100, await cost(app, lambda: transcript.find("recursively")), "ms")
        yield Cost("go to the next match", 60, await cost(app, transcript.find_next, 5), "ms")
        yield Cost("all thoughts open", 100, await cost(app, transcript.toggle_thoughts), "ms")


async def resizing(app: App, transcript: Transcript) -> float:
    """Milliseconds per change of the width; the app waits a little for further ones before it acts."""
    widths = (110, 90, 120, 80, 100)
    began = time.process_time()
    for width in widths:
        app.post_message(Resize(Size(width, SIZE[1]), Size(width, SIZE[1])))
        while transcript.outer_size.width != width:
            await asyncio.sleep(0.01)
        await painted(app)
    return 1e3 * (time.process_time() - began) / len(widths)


@budget
async def memory() -> AsyncIterator[Cost]:
    """The most that the process ever held with 2,000 turns loaded and half of them looked at."""
    async with stage(TURNS) as (app, transcript):
        for part in range(100):
            transcript.scroll_to(y=transcript.virtual_size.height * part // 200, animate=False)
            await painted(app)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield Cost(
            "resident memory, 2,000 turns", 100, most / (2**20 if sys.platform == "darwin" else 2**10), "MB"
        )


# --- the whole app ---


@budget
async def keypress() -> AsyncIterator[Cost]:
    """A letter typed into the prompt until it is on the screen, 2,000 turns above and all panes open."""
    with tempfile.TemporaryDirectory() as folder:
        async with running(Path(folder), size=PANES_SIZE) as it:
            await it.idle()
            state = conversation(TURNS)
            it.screen.transcript.show(state)
            it.chat.state = state
            await painted(it.app)
            gc.collect()
            gc.freeze()
            times = sorted(
                [await cost(it.app, lambda: it.app.post_message(Key("a", "a"))) for _ in range(200)]
            )
            assert it.prompt.text == "a" * 200
            yield Cost("key to repaint, 2,000 turns", 8, times[100], "ms")
            yield Cost("key to repaint, 2,000 turns, p99", 16, times[197], "ms")
            panel = it.screen.panes.panel
            yield Cost("all panes drawn anew, 2,000 turns", 16, await cost(it.app, panel.redraw, 20), "ms")


@budget
async def terminal() -> AsyncIterator[Cost]:
    """At a real terminal, with the small model of the package."""
    yield Cost("start to first paint", 1_000, 1e3 * app_probe.measure("paint"), "ms")
    yield Cost("idle, share of a core", 0.5, 100 * app_probe.measure("idle"), "%")
    pairs = [(app_probe.one_shot(), app_probe.measure("reply")) for _ in range(RUNS)]
    alone, inside = (max(speeds) for speeds in zip(*pairs, strict=True))
    yield Cost("generation slower than one-shot", 5, 100 * (1 - inside / alone), "%")


@budget
async def command_line() -> AsyncIterator[Cost]:
    """Processor time, the least of some runs, that passes before the user hears of anything."""
    cpu_seconds("-p", "Hi.", "--max-tokens", "1")  # which leaves the bytecode behind
    spent = min(cpu_seconds("--help") for _ in range(RUNS))
    yield Cost("CPU of --help", 120, 1e3 * spent, "ms")
    if Path("/proc/self/stat").exists():
        begun = min(cpu_seconds_until_prefill() for _ in range(RUNS))
        yield Cost("CPU of one answer until prefill", 600, 1e3 * begun, "ms")


def cpu_seconds(*words: str) -> float:
    """Of the whole run of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "qchat.tui", *words], env=PACKAGE, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_seconds_until_prefill() -> float:
    """With the small model of the package."""
    command = [sys.executable, "-m", "qchat.tui", "-p", "What is the capital of France?", "--jsonl"]
    with subprocess.Popen(command, env=PACKAGE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while json.loads(process.stdout.readline())["event"] != "prefill":
            pass
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        process.kill()
    user, system = int(fields[11]), int(fields[12])  # proc(5): utime and stime, in clock ticks
    return (user + system) / os.sysconf("SC_CLK_TCK")


# --- the table ---


async def measured(name: str) -> list[Cost]:
    return [row async for row in BUDGETS[name]()]


def apart(name: str) -> list[Cost]:
    """The rows of one budget, measured in a process of its own."""
    command = [sys.executable, __file__, "--measure", name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        Cost(what, float(limit), float(value), unit)
        for what, limit, value, unit in (x.split("\t") for x in lines)
    ]


def main(names: list[str]) -> int:
    if names[:1] == ["--measure"]:
        for row in asyncio.run(measured(names[1])):
            print(*row, sep="\t")
        return 0
    broken = 0
    print(f"{'what':<40} {'budget':>10} {'measured':>12}")
    for name in names or BUDGETS:
        for row in apart(name):
            mark = "" if row.value <= row.limit else "  broken"
            broken += bool(mark)
            print(
                f"{row.what:<40} {row.limit:>7,g} {row.unit:<2} {row.value:>9.1f} {row.unit}{mark}",
                flush=True,
            )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
