"""The pane of the branches: the conversation's tree as a small graph, one row for each branch."""

from collections.abc import Sequence

from ....core.conversation.summary import SOON, Branch
from ...text.report import Line
from ...text.sanitise import cut, printable
from .drawing import line_cells
from .facts import Pane, PaneFacts

REPLY, HERE, INSTANT = "●", "◉", "★"
MOST_ROWS = 8
# the legend looks for stars among so many replies of a branch
MOST_STARS = 32
# of a row, what the graph may take; the words of the branch have the rest
GRAPH_SHARE = 0.6


def ends_of(facts: PaneFacts) -> list[int]:
    """Return the branches by the numbers of their last replies: the current one, then the newest first."""
    return [branch.number for branch in _ordered(facts)]


def _ordered(facts: PaneFacts) -> list[Branch]:
    state, branches = facts.state, list(facts.state.branches)
    if facts.last is not None and not any(branch.current for branch in branches):
        # the current reply has others after it, so no branch ends here
        turns = len(state.turns)
        branches.append(Branch(facts.last.node, facts.last.question, True, turns, turns))
    return sorted(branches, key=lambda branch: (not branch.current, -branch.number))


def _window(facts: PaneFacts, rows: int) -> list[Branch]:
    """Return the branches that are shown in `rows` rows; the cursor is always among them."""
    ordered = _ordered(facts)
    place = next((n for n, branch in enumerate(ordered) if branch.number == facts.chosen), 0)
    first = max(0, min(place - rows + 1, len(ordered) - rows))
    return ordered[first : first + rows]


def branch_of_row(facts: PaneFacts, row: int, rows: int) -> int | None:
    """Return the branch shown in `row` of `rows`, by the number of its last reply."""
    shown = _window(facts, rows)
    return shown[row].number if 0 <= row < len(shown) else None


def draw_branches(facts: PaneFacts, width: int, rows: int) -> list[Line]:
    """Return a row for each branch: the replies that are its own, after those it shares, and its words."""
    if not _ordered(facts):
        return [[("dim", "an edit or a retry begins a branch")]]
    room = max(int((width - 2) * GRAPH_SHARE) // 2, 1)
    longest = max(branch.turns for branch in _ordered(facts))
    hidden = max(0, longest - room)
    return [_row(facts, branch, hidden, width) for branch in _window(facts, rows)]


def _row(facts: PaneFacts, branch: Branch, hidden: int, width: int) -> Line:
    """Return one branch without its first `hidden` turns."""
    cursor: Line = [("cursor", "› ") if branch.number == facts.chosen else ("", "  ")]
    first = 0 if branch.current else branch.shared
    indent = 2 * max(first - hidden, 0)
    own = branch.turns - max(first, hidden)
    lead = "…" if hidden and first <= hidden else ""
    fork = "└─" if first > hidden else ""
    marks = _marks(facts, branch, own)
    graph: Line = [("", " " * max(indent - len(fork), 0)), ("frame", lead + fork)]
    for place, mark in enumerate(marks):
        graph += [("frame", "─" if place else ""), mark]
    words = " " + " ".join(printable(branch.first_words).split())
    left = width - line_cells(cursor) - line_cells(graph)
    return [*cursor, *graph, ("" if branch.current else "dim", cut(words, left) if left > 4 else "")]


def _marks(facts: PaneFacts, branch: Branch, count: int) -> Sequence[tuple[str, str]]:
    """Return a mark for each of the last `count` replies: where one is, or could be at once."""
    if count <= 0:
        return []
    if branch.current:
        ends = [turn.stats.prompt_tokens + turn.stats.generated_tokens for turn in facts.state.turns[-count:]]
        marks = [("star", INSTANT) if _is_kept(facts, end) else ("here", REPLY) for end in ends]
        return [*marks[:-1], ("here", HERE)]
    instant = facts.cache is not None and branch.number in facts.cache.instant
    return [("dim", REPLY)] * (count - 1) + [("star", INSTANT) if instant else ("dim", REPLY)]


def _is_kept(facts: PaneFacts, end: int) -> bool:
    """Whether a snapshot holds all but a few of the first `end` tokens of the current branch."""
    snapshots = facts.cache.snapshots if facts.cache else ()
    return any(end - SOON <= one.tokens <= end for one in snapshots)


def brief_branches(facts: PaneFacts, width: int) -> Line:
    """Return which branch of how many this is."""
    del width
    branches = sorted(_ordered(facts), key=lambda branch: branch.number)
    if len(branches) < 2:
        return []
    place = next((n for n, branch in enumerate(branches, 1) if branch.current), None)
    if place is None:  # the first question was taken back
        return [("dim", f"{len(branches)} branches")]
    return [("here", f"{HERE} {place}"), ("dim", f" of {len(branches)}")]


def note_branches(facts: PaneFacts) -> Line:
    for branch in _ordered(facts):
        if any(style == "star" for style, _ in _marks(facts, branch, min(branch.turns, MOST_STARS))):
            return [("star", INSTANT), ("dim", " instant")]
    return []


PANE = Pane(
    name="branches",
    least=1,
    wanted=lambda facts: min(len(_ordered(facts)), MOST_ROWS),
    note=note_branches,
    lines=draw_branches,
    brief=brief_branches,
)
