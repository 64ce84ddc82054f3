"""The pane of the context: how full it is, and which tokens of which turn were reused, read or generated."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from ...text.figures import format_tokens
from ...text.report import Line
from .drawing import flow, stacked
from .facts import Pane, PaneFacts

WARN, HOT = 0.80, 0.92
# a turn narrower than this has no mark of its own
LEAST_TURN_CELLS = 3
BRIEF_CELLS = 10


@dataclass(frozen=True)
class Parts:
    """The tokens in the context, by what the last reply did with them."""

    reused: int
    read: int
    new: int

    @property
    def total(self) -> int:
        return self.reused + self.read + self.new


def parts_of(facts: PaneFacts) -> Parts:
    """Return the parts as of the running reply, or else of the last one."""
    status, last = facts.status, facts.last
    if facts.replying:
        reply, total = status.reply, status.context_tokens
        cached = min(reply.cached_tokens, total)
        prompt = min(max(reply.prompt_tokens, cached), total)
        return Parts(cached, prompt - cached, total - prompt)
    total = facts.state.tokens
    if last is None:
        return Parts(0, 0, total)
    new = min(last.stats.generated_tokens, total)
    reused = min(last.stats.cached_tokens, total - new)
    return Parts(reused, total - new - reused, new)


def draw_context(facts: PaneFacts, width: int, rows: int) -> list[Line]:
    """Return the bar of the whole context, and below it that of its used part, turn by turn."""
    parts, limit = parts_of(facts), facts.status.context_limit
    if not limit or not parts.total:
        return [[("dim", "empty: the first question begins it")]]
    named = (("reused", "▒", "reused", parts.reused), ("read", "█", "read", parts.read))
    items: list[Line] = [
        [(style, character), ("dim", f" {name} "), ("", format_tokens(tokens))]
        for style, character, name, tokens in (*named, ("new", "▓", "new", parts.new))
        if tokens
    ]
    lines = [_bar(parts, limit, width)]
    if rows >= 3:
        lines += _turns(facts, parts, width)[: rows - 2]
    return [*lines, *flow(items, width, min(rows - len(lines), 1))]


def brief_context(facts: PaneFacts, width: int) -> Line:
    parts, limit = parts_of(facts), facts.status.context_limit
    if not limit or not parts.total:
        return []
    del width
    return [*_bar(parts, limit, BRIEF_CELLS), ("", " "), *note_context(facts)]


def note_context(facts: PaneFacts) -> Line:
    """Return the tokens used of those that fit, with a sign where that is nearly all."""
    total, limit = parts_of(facts).total, facts.status.context_limit
    if not limit:
        return []
    share = total / limit
    level = "hot" if share >= HOT else "warn" if share >= WARN else ""
    amount = f"{format_tokens(total)}/{format_tokens(limit)}"
    return [(level, f"▲ {amount}" if level else amount)]


def _bar(parts: Parts, total: int, width: int) -> Line:
    named = (("reused", "▒", parts.reused), ("read", "█", parts.read), ("new", "▓", parts.new))
    return stacked(named, total, width)


def _turns(facts: PaneFacts, parts: Parts, width: int) -> list[Line]:
    """Return the used part alone, cut into turns, and the number of each turn below its beginning."""
    begins = _begins(facts, width, parts.total)
    bar = _bar(parts, parts.total, width)
    kinds = [(style, character) for style, text in bar for character in text]
    for cell in list(begins)[1:]:
        kinds[cell] = ("frame", "│")
    numbers = ""
    for cell, number in begins.items():
        if cell >= len(numbers):
            numbers = f"{numbers:<{cell}}#{number}"
            numbers += " " if len(numbers) < width else ""
    return [_joined(kinds), [("dim", numbers[:width].rstrip())]]


def _begins(facts: PaneFacts, width: int, total: int) -> dict[int, int]:
    """Return the numbers of turns by the cells in which they begin; the running turn is the last one.

    Of many turns only the last ones are marked, as many as have room.
    """
    turns = facts.state.turns[-width:]
    ends = list(accumulate((turn.stats.prompt_tokens + turn.stats.generated_tokens for turn in turns), max))
    if not facts.replying and ends:
        ends[-1] = total
    elif facts.replying:
        ends = [*(end for end in ends if end < total), total]
    first = turns[0].number if turns else 1
    if first == 1:
        ends = [0, *ends]
    cells: dict[int, int] = {0: 1}
    for number, (begin, end) in enumerate(pairwise(ends), 1 if first == 1 else first + 1):
        cell = int(begin / total * width) if total else 0
        if number > 1 and cell < width and (end - begin) / total * width >= LEAST_TURN_CELLS:
            cells[cell] = number
    return cells


def _joined(kinds: list[tuple[str, str]]) -> Line:
    line: Line = []
    for style, character in kinds:
        if line and line[-1][0] == style:
            line[-1] = (style, line[-1][1] + character)
        else:
            line.append((style, character))
    return line


PANE = Pane(
    name="context", least=2, wanted=lambda _: 4, note=note_context, lines=draw_context, brief=brief_context
)
