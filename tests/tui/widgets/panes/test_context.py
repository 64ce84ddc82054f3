"""The pane of the context: what was reused, read and generated, and which turn it is."""

from qchat.tui.chat.meter import Status
from qchat.tui.widgets.panes.context import PANE, Parts, parts_of
from tests.tui.widgets.panes.pane_facts import conversation, drawn, facts_of, replying, text_of


def test_the_last_turn_tells_what_was_reused_read_and_generated():
    facts = facts_of()
    assert parts_of(facts) == Parts(200, 20, 80)
    whole, turns, numbers, legend = drawn(PANE, facts, 30, 4)
    assert whole == "▒" * 6 + "█" + "▓" * 2 + "·" * 21
    assert turns == "▒" * 20 + "│" + "█" + "▓" * 8
    assert numbers == f"#1{' ' * 18}#2"
    assert legend == "▒ reused 200  █ read 20"
    assert drawn(PANE, facts, 40, 4)[-1] == "▒ reused 200  █ read 20  ▓ new 80"


def test_a_running_reply_grows_into_the_context():
    facts = facts_of(replying(), state=conversation((20, 30)))
    assert parts_of(facts) == Parts(40, 60, 200)
    assert drawn(PANE, facts, 30, 4)[2] == "#1   #2"
    reading = Status(phase="reading", context_tokens=60, context_limit=1000)
    reading.reply.prompt_tokens, reading.reply.cached_tokens = 100, 40
    assert parts_of(facts_of(reading)) == Parts(40, 20, 0)


def test_many_turns_are_marked_only_where_there_is_room():
    facts = facts_of(state=conversation(*[(1, 1)] * 400, (300, 100)))
    numbers = drawn(PANE, facts, 40, 4)[2]
    assert numbers.split() == ["#1", "#401"]
    facts = facts_of(state=conversation(*[(20, 20)] * 4))
    assert drawn(PANE, facts, 40, 4)[2].split() == ["#1", "#2", "#3", "#4"]


def test_a_context_that_is_nearly_full_is_marked_by_a_sign_and_a_colour():
    for tokens, style, text in (
        (500, "", "500/1.0k"),
        (850, "warn", "▲ 850/1.0k"),
        (950, "hot", "▲ 950/1.0k"),
    ):
        assert PANE.note(facts_of(state=conversation((tokens - 50, 50)))) == [(style, text)]


def test_an_empty_context_and_few_rows_are_fine():
    assert drawn(PANE, facts_of(state=conversation())) == ["empty: the first question begins it"]
    assert len(drawn(PANE, facts_of(), rows=2)) == 2
    assert len(drawn(PANE, facts_of(), 40, 1)) == 1
    assert text_of(PANE.brief(facts_of(), 30)) == f"{'▒' * 2}█▓{'·' * 6} 300/1.0k"
