"""The pane of the memory: one bar of what the engine holds, against the device's limit."""

from typing import TYPE_CHECKING

from ...text.report import Line
from .drawing import flow, format_nbytes, marked, stacked
from .facts import Pane, PaneFacts

if TYPE_CHECKING:
    from ....core.worker.wire import MemoryResult
    from ...chat.meter import Status

WARN, HOT = 0.80, 0.92
PEAK = "┃"
BRIEF_CELLS = 10


def held(facts: PaneFacts) -> "Status | MemoryResult":
    """Return whichever knows what is held: before the first reply only the engine's answer does."""
    return facts.status if facts.status.active_nbytes or facts.memory is None else facts.memory


def parts_of(facts: PaneFacts) -> list[tuple[str, str, str, float]]:
    """Return style, character, name and bytes of each part: they add up to what MLX holds.

    Keys and values are what is neither weights nor snapshots, so a few buffers count as theirs.
    """
    now = held(facts)
    known = facts.memory.weights_nbytes if facts.memory else facts.model.nbytes if facts.model else 0
    weights = min(known, now.active_nbytes)
    rest = now.active_nbytes - weights
    snapshots = min(facts.memory.snapshot_nbytes if facts.memory else 0, rest)
    return [
        ("weights", "█", "weights", weights),
        ("keys", "▓", "KV", rest - snapshots),
        ("snapshots", "▒", "snapshots", snapshots),
        ("cache", "░", "cache", now.cache_nbytes),
    ]


def draw_memory(facts: PaneFacts, width: int, rows: int) -> list[Line]:
    """Return the bar and, below it, what its parts are."""
    now = held(facts)
    if not now.active_nbytes:
        return [[("dim", "known once the model replies")]]
    legend: list[Line] = [
        [(style, character), ("dim", f" {name} "), ("", format_nbytes(nbytes))]
        for style, character, name, nbytes in parts_of(facts)
        if nbytes
    ]
    peak: Line = [("peak", PEAK), ("dim", " peak "), ("", format_nbytes(now.peak_nbytes))]
    return [_bar(facts, width), *flow([*legend, peak], width, rows - 1)]


def brief_memory(facts: PaneFacts, width: int) -> Line:
    if not held(facts).active_nbytes:
        return []
    del width
    return [*_bar(facts, BRIEF_CELLS), ("", " "), *note_memory(facts)]


def note_memory(facts: PaneFacts) -> Line:
    """Return what is held of how much, with a sign where that is nearly all."""
    now = held(facts)
    used, limit = now.active_nbytes + now.cache_nbytes, now.limit_nbytes
    if not used:
        return []
    share = used / limit if limit else 0.0
    level = "hot" if share >= HOT else "warn" if share >= WARN else ""
    amount = f"{used / 1e9:.1f}/{limit / 1e9:.0f} GB" if limit else format_nbytes(used)
    return [(level, f"▲ {amount}" if level else amount)]


def _bar(facts: PaneFacts, width: int) -> Line:
    """Return the bar, with a mark at the peak; without a limit the peak is all of it."""
    now = held(facts)
    used = now.active_nbytes + now.cache_nbytes
    total = max(now.limit_nbytes or now.peak_nbytes, used)
    bar = stacked(
        [(style, character, nbytes) for style, character, _, nbytes in parts_of(facts)], total, width
    )
    if not now.peak_nbytes:
        return bar
    return marked(bar, min(int(now.peak_nbytes / total * width), width - 1), "peak", PEAK)


PANE = Pane(
    name="memory", least=2, wanted=lambda _: 4, note=note_memory, lines=draw_memory, brief=brief_memory
)
