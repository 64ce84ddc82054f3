"""The pane of the thought: its end, its figures, the budget, and nothing that a terminal would obey."""

from dataclasses import replace

from qchat.core.conversation.summary import TurnStats
from qchat.core.events import Performance
from qchat.tui.widgets.panes.thinking import PANE, tail
from tests.tui.widgets.panes.pane_facts import conversation, drawn, facts_of, replying, text_of

THINKING = replying(phase="thinking", thought_tokens=128)


def test_the_last_lines_of_the_thought_follow_its_figures():
    thought = "\n".join(f"line {number}" for number in range(50))
    lines = drawn(PANE, facts_of(THINKING, thought=thought), 30, 4)
    assert lines == ["128 tokens · 3.0 s", "line 47", "line 48", "line 49"]


def test_the_budget_is_a_bar_and_a_number():
    facts = facts_of(THINKING, thought="Hm.", budget=256)
    assert drawn(PANE, facts, 40, 2)[0] == f"128 tokens · 3.0 s{' ' * 6}{'█' * 6}{'·' * 6} 50%"
    assert text_of(PANE.note(facts)) == "budget 256"
    over = facts_of(replying(phase="thinking", thought_tokens=300), thought="Hm.", budget=256)
    assert ("hot", "█" * 12) in PANE.lines(over, 40, 2)[0]


def test_a_finished_thought_is_shown_until_the_next_question():
    state = conversation((10, 10))
    stats = TurnStats(reasoning_tokens=212, performance=Performance(seconds_thinking=4.1))
    turn = replace(state.turns[0], thinking="First this.\nThen that.", stats=stats)
    lines = drawn(PANE, facts_of(state=replace(state, turns=(turn,))))
    assert lines == ["212 tokens · 4.1 s", "First this.", "Then that."]


def test_no_thought_at_all_says_so():
    assert drawn(PANE, facts_of()) == ["thoughts of the model appear here"]
    assert PANE.brief(facts_of(), 40) == []


def test_lines_stay_as_they_are_while_the_thought_grows():
    words = [f"word{number}" for number in range(200)]
    seen: set[str] = set()
    for count in range(1, len(words)):
        lines = tail(" ".join(words[:count]), 20, 4)
        seen.update(lines[:-1])
    assert seen <= set(tail(" ".join(words), 20, 1000))


def test_wide_characters_are_wrapped_by_their_cells():
    assert tail("中文" * 20, 10, 3) == ["文中文中文", "中文中文中", "文中文中文"]


def test_in_a_strip_the_end_of_the_thought_fills_the_room():
    brief = text_of(PANE.brief(facts_of(THINKING, thought="start " * 30 + "and the end"), 50))
    assert brief.startswith("128 tokens · 3.0 s  ")
    assert brief.endswith("and the end")
    assert text_of(PANE.brief(facts_of(THINKING, thought="long " * 30), 20)) == "128 tokens · 3.0 s"
