"""The pane of the memory: parts that add up, the peak, and the warning."""

import pytest

from qchat.tui.chat.meter import Status
from qchat.tui.widgets.panes.memory import PANE, parts_of
from tests.tui.widgets.panes.pane_facts import GB, drawn, facts_of, memory, text_of

HELD = Status(
    phase="answering",
    active_nbytes=12 * GB,
    cache_nbytes=2 * GB,
    peak_nbytes=16 * GB,
    limit_nbytes=20 * GB,
)


def test_the_bar_is_stacked_against_the_limit_with_a_mark_at_the_peak():
    bar, *legend = drawn(PANE, facts_of(HELD, memory=memory()))
    assert bar == "█" * 16 + "▓" * 6 + "▒" * 2 + "░" * 4 + "·" * 4 + "┃" + "·" * 7
    assert legend == [
        "█ weights 8.0 GB  ▓ KV 3.0 GB",
        "▒ snapshots 1.0 GB  ░ cache 2.0 GB",
        "┃ peak 16.0 GB",
    ]


def test_the_parts_add_up_to_what_is_held_also_before_the_engine_was_asked():
    for known in (None, memory(), memory(weights_nbytes=90 * GB)):
        assert sum(nbytes for *_, nbytes in parts_of(facts_of(HELD, memory=known))) == 14 * GB


def test_before_the_first_reply_the_answer_of_the_engine_counts():
    assert drawn(PANE, facts_of())[0] == "known once the model replies"
    assert drawn(PANE, facts_of(memory=memory()))[0].startswith("█" * 16)


@pytest.mark.parametrize(
    ("active", "style", "text"),
    [(9, "", "11.0/20 GB"), (15, "warn", "▲ 17.0/20 GB"), (17, "hot", "▲ 19.0/20 GB")],
)
def test_little_free_memory_is_marked_by_a_sign_and_a_colour(active: int, style: str, text: str):
    status = Status(phase="idle", active_nbytes=active * GB, cache_nbytes=2 * GB, limit_nbytes=20 * GB)
    assert PANE.note(facts_of(status)) == [(style, text)]


def test_an_unknown_limit_and_one_row_are_fine():
    status = Status(phase="idle", active_nbytes=5 * 10**8, cache_nbytes=0, peak_nbytes=10**9)
    lines = drawn(PANE, facts_of(status), rows=1)
    assert len(lines) == 1
    assert lines[0].endswith("┃")
    assert text_of(PANE.note(facts_of(status))) == "500 MB"
    assert text_of(PANE.brief(facts_of(HELD), 40)).endswith("14.0/20 GB")
