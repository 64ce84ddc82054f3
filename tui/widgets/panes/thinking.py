"""The pane of the thought: its last lines as they come, its tokens and seconds, and the budget."""

from ...text.figures import format_tokens
from ...text.report import Line
from ...text.sanitise import cells, cut, printable, wrap
from .drawing import spread, stacked
from .facts import Pane, PaneFacts

BUDGET_CELLS = 12
LEAST_BRIEF = 8


def draw_thinking(facts: PaneFacts, width: int, rows: int) -> list[Line]:
    """Return the figures of the running thought, or of the last reply's, and its last lines."""
    figures = _figures(facts)
    if not figures:
        return [[("dim", "thoughts of the model appear here")]]
    lines = [spread(figures, _budget(facts), width)]
    if facts.replying and facts.thought and rows > 1:
        lines += [[("thought", row)] for row in tail(facts.thought, width, rows - 1)]
    elif not facts.replying and facts.last is not None:
        lines += [[("dim", row)] for row in tail(facts.last.thinking, width, rows - 1)]
    return lines


def tail(text: str, width: int, rows: int) -> list[str]:
    """Return the last `rows` lines of `text`, wrapped to `width` cells.

    Paragraphs are wrapped from their beginning, so that lines stay as they are while the text grows.
    """
    lines: list[str] = []
    for paragraph in reversed(printable(text).replace("\t", " ").split("\n")):
        if paragraph.strip():
            lines = [*wrap(paragraph, width), *lines]
        if len(lines) >= rows:
            break
    return lines[-rows:]


def brief_thinking(facts: PaneFacts, width: int) -> Line:
    """Return the figures, and the end of the running thought in the cells that are left."""
    figures = _figures(facts)
    if not figures or facts.status.phase != "thinking":
        return figures
    line = " ".join(printable(facts.thought[-width:]).split())
    room = width - sum(cells(text) for _, text in figures) - 2
    if room < LEAST_BRIEF:
        return figures
    while line and cells(line) > room:
        line = line[max(1, (cells(line) - room) // 2) :]
    return [*figures, ("", "  "), ("thought", cut(line, room))]


def _figures(facts: PaneFacts) -> Line:
    """Return tokens and seconds of the running thought, or of the last reply's."""
    if facts.replying:
        tokens, seconds = facts.status.thought_tokens, facts.status.reply.seconds_thinking
    elif facts.last is not None:
        tokens, seconds = facts.last.stats.reasoning_tokens, facts.last.seconds_thinking
    else:
        tokens, seconds = 0, 0.0
    if not tokens:
        return []
    return [("", f"{tokens:,}"), ("dim", f" token{'s' if tokens > 1 else ''} · "), ("", f"{seconds:.1f} s")]


def _budget(facts: PaneFacts) -> Line:
    """Return a bar of the budget while the thought lasts."""
    if not facts.budget or not facts.replying:
        return []
    share = facts.status.thought_tokens / facts.budget
    style = "hot" if share >= 1 else "warn" if share >= 0.8 else "ok"
    bar = stacked([(style, "█", facts.status.thought_tokens)], facts.budget, BUDGET_CELLS)
    return [*bar, ("dim", f" {min(share, 1):.0%}")]


def note_thinking(facts: PaneFacts) -> Line:
    return [("dim", f"budget {format_tokens(facts.budget)}")] if facts.budget is not None else []


PANE = Pane(
    name="thinking",
    least=2,
    wanted=lambda _: 6,
    note=note_thinking,
    lines=draw_thinking,
    brief=brief_thinking,
)
