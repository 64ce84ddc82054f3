"""The pane of the speed: figure, chart and words, in every phase and height."""

import pytest

from qchat.tui.chat.meter import ReplyFigures, Status
from qchat.tui.widgets.panes.speed import PANE, digits
from tests.tui.widgets.panes.pane_facts import conversation, drawn, facts_of, replying, text_of


def test_reading_is_shaded_before_the_columns_for_its_share_of_the_time():
    chart = drawn(PANE, facts_of(replying()))[3:6]
    assert chart == ["░" * 10 + "█" * 20] * 3


def test_a_long_reply_is_drawn_in_the_width_there_is():
    speeds = [10.0] * 390 + [20.0] * 390
    chart = drawn(PANE, facts_of(replying(seconds=250.0, reply=ReplyFigures(speeds, 2.0))))[3:6]
    assert chart[0] == "░" + " " * 19 + "▂" + "█" * 19
    assert chart[2] == "░" + "█" * 39


def test_the_figure_is_large_and_says_what_it_is():
    lines = drawn(PANE, facts_of(replying(bandwidth_share=0.68)))
    assert [line[: len(row)] for line, row in zip(lines, digits("20.3"), strict=False)] == digits("20.3")
    assert "tok/s" in lines[0]
    assert "68% of the bandwidth" in lines[1]
    assert "answering" in lines[2]
    assert lines[-1] == "first token 2.00 s"


def test_drafts_are_named_with_their_gain():
    status = replying(drafts_accepted=0.62, draft_gain=1.61)
    assert drawn(PANE, facts_of(status))[-1] == "first token 2.00 s · drafts 62% ×1.61"


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_with_few_rows_the_figure_comes_first(rows: int):
    lines = drawn(PANE, facts_of(replying(bandwidth_share=0.68)), rows=rows)
    assert lines[0].startswith("20.3 tok/s")
    assert lines[0].endswith("68% of the bandwidth")
    assert len(lines) == rows


def test_reading_shows_its_speed_and_progress():
    status = Status(phase="reading", done=250, total=1000, tokens_per_s=412)
    lines = drawn(PANE, facts_of(status), rows=4)
    assert lines[0] == "412 tok/s read"
    assert lines[1:3] == ["░" * 10] * 2
    assert lines[-1] == "250 of 1,000 tokens read"


def test_without_a_running_reply_the_last_turn_counts_and_the_turns_are_drawn():
    lines = drawn(PANE, facts_of(), rows=4)
    assert lines[0] == "22.0 tok/s"
    assert [len(line) for line in lines[1:3]] == [2, 2]
    assert lines[-1] == "first token 0.50 s"


def test_an_empty_conversation_and_a_missing_model_say_so():
    assert drawn(PANE, facts_of(state=conversation())) == ["the first reply is measured here"]
    assert drawn(PANE, facts_of(model=None)) == ["no model: f2 or /load chooses one"]


def test_in_a_strip_there_are_words_where_there_is_room():
    assert text_of(PANE.brief(facts_of(replying()), 40)).startswith("20.3 tok/s ")
    assert "first token" not in text_of(PANE.brief(facts_of(), 40))
    assert text_of(PANE.brief(facts_of(), 90)).endswith("first token 0.50 s")
