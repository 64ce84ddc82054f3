"""The pane of the branches: a graph, the place in it, and where a return is instant."""

from dataclasses import replace

from qchat.core.conversation.summary import Branch, SnapshotSummary
from qchat.tui.widgets.panes.branches import PANE, branch_of_row, ends_of
from tests.tui.widgets.panes.pane_facts import NO_CACHE, conversation, drawn, facts_of, text_of

TREE = (
    Branch(8, "about Spain", False, 4, 2),
    Branch(6, "about France", True, 3, 3),
    Branch(20, "a new root", False, 1, 0),
)
STATE = conversation((10, 10), (10, 10), (10, 10), branches=TREE)


def test_each_branch_has_a_row_that_leaves_the_current_one_where_it_parts():
    assert drawn(PANE, facts_of(state=STATE)) == [
        "  ●─●─◉ about France",
        "  ● a new root",
        "    └─●─● about Spain",
    ]


def test_a_star_marks_where_a_snapshot_makes_the_return_instant():
    kept = (SnapshotSummary(1, "B", 20, 1), SnapshotSummary(2, "A", 25, 1))
    cache = replace(NO_CACHE, instant=(8,), snapshots=kept)
    facts = facts_of(state=STATE, cache=cache)
    assert drawn(PANE, facts)[0].startswith("  ★─★─◉")
    assert drawn(PANE, facts)[2] == "    └─●─★ about Spain"
    assert text_of(PANE.note(facts)) == "★ instant"
    assert PANE.note(facts_of(state=STATE, cache=NO_CACHE)) == []


def test_the_cursor_is_a_sign_and_the_rows_follow_it():
    facts = facts_of(state=STATE, chosen=8)
    assert ends_of(facts) == [6, 20, 8]
    assert drawn(PANE, facts, rows=2) == ["  ● a new root", "›   └─●─● about Spain"]
    assert [branch_of_row(facts, row, 2) for row in range(3)] == [20, 8, None]
    assert branch_of_row(facts_of(state=STATE), 0, 2) == 6
    assert branch_of_row(facts_of(state=STATE), -1, 2) is None


def test_one_may_be_where_no_branch_ends():
    state = replace(conversation((10, 10)), branches=(Branch(9, "further on", False, 3, 1),))
    assert drawn(PANE, facts_of(state=state)) == ["  ◉ question 1", "  └─●─● further on"]


def test_the_beginning_of_a_long_branch_is_left_out():
    branches = (Branch(200, "x", True, 100, 100), Branch(7, "y", False, 3, 1))
    long = conversation(*[(1, 1)] * 100, branches=branches)
    first, second = drawn(PANE, facts_of(state=long), 30)
    assert first == f"  …{'●─' * 7}◉ x"
    assert second == "  … y"


def test_what_others_wrote_is_shown_on_one_line():
    state = conversation((1, 1), branches=(Branch(2, "a\nb\tc", True, 1, 1),))
    assert drawn(PANE, facts_of(state=state)) == ["  ◉ a b c"]


def test_no_branch_and_one_branch_need_no_place_in_a_strip():
    assert drawn(PANE, facts_of(state=conversation())) == ["an edit or a retry begins a branch"]
    assert PANE.brief(facts_of(), 40) == []
    assert text_of(PANE.brief(facts_of(state=STATE), 40)) == "◉ 1 of 3"


def test_before_the_first_question_no_branch_is_the_one_here():
    """An undo of the first question goes there, and its answers stay as branches."""
    state = replace(conversation(), branches=tuple(replace(one, current=False, shared=0) for one in TREE))
    assert text_of(PANE.brief(facts_of(state=state), 40)) == "3 branches"
    assert all("◉" not in row for row in drawn(PANE, facts_of(state=state)))
