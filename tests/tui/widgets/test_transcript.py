"""The conversation on a screen: what it shows, also while it grows, and that it stays where it is read."""

import random
import re
from itertools import pairwise
from typing import Literal

import pytest

from qchat.core.conversation.summary import ToolCall
from qchat.core.events import Done, FinishReason, ToolUse
from qchat.tui.text.markdown.lines import copied
from qchat.tui.text.report import Lines, Markdown, Report, Table
from qchat.tui.text.sanitise import cells
from tests.tui.transcript_stage import CODE, HOSTILE, UNICODE, long_turns, played, said, scene, state, turn

# --- what is shown ---


@pytest.mark.slow
@played
async def test_a_turn_is_a_numbered_question_a_folded_thought_and_an_answer():
    async with scene() as it:
        await it.show(turn(3, answer="Yes, **sure**."))
        rows = it.rows()
        assert re.fullmatch(r"▌ question 3 +#3  \d\d:\d\d", rows[0])
        assert re.fullmatch(r"  ▸ thought 4\.1 s · 1,212 tokens +ctrl\+o to read", rows[2])
        assert rows[3:6] == ["", "  Yes, sure.", ""]


@played
async def test_other_answers_to_a_question_are_counted_and_reached_by_click():
    async with scene() as it:
        await it.show(turn(1, node=7, siblings=(5, 7, 9)))
        assert "‹ 2/3 ›" in it.rows()[0]
        await it.click("›")
        await it.click("‹")
        assert [(ask.turn, ask.step) for ask in it.app.asked] == [(1, 1), (1, -1)]


@played
async def test_a_long_question_is_folded_until_it_is_opened():
    async with scene(height=40) as it:
        await it.show(turn(1, question="\n".join(f"line {n}" for n in range(30))))
        assert "line 12" not in "\n".join(it.rows())
        await it.click("▸ 18 more lines")
        assert "line 29" in "\n".join(it.rows())


@played
async def test_the_last_lines_of_a_thought_are_shown_while_it_goes_on_and_then_folded():
    async with scene() as it:
        it.transcript.add_question(turn(1))
        it.transcript.begin_answer(turn(1))
        await it.stream("one\ntwo\nthree\n", "four\nfive", kind="thought")
        it.app.clock.now = 2.0
        await it.stream(" more", kind="thought")
        assert it.rows()[2:7] == ["  ▾ thinking 2.0 s · 3 tokens", "  three", "  four", "  five more", ""]
        await it.stream("Yes.")
        assert it.rows()[2].startswith("  ▸ thought 2.0 s · 3 tokens")
        assert it.rows()[4] == "  Yes."
        it.transcript.end_answer(Done("stop"), turn(1, thinking="x"))
        await it.settle()
        assert it.rows()[2].startswith("  ▸ thought 4.1 s · 1,212 tokens")


@played
async def test_thoughts_open_by_click_and_all_at_once():
    async with scene() as it:
        await it.show(turn(1), turn(2))
        await it.click("▸ thought")
        assert [row for row in it.rows() if row.startswith("  thought")] == ["  thought 1"]
        it.transcript.toggle_thoughts()
        await it.settle()
        assert [row for row in it.rows() if row.startswith("  thought")] == ["  thought 1", "  thought 2"]
        it.transcript.toggle_thoughts()
        await it.settle()
        assert not [row for row in it.rows() if row.startswith("  thought")]


@played
async def test_without_live_lines_a_thought_is_one_line_from_the_start():
    async with scene() as it:
        it.transcript.thoughts = "folded"
        it.transcript.add_question(turn(1))
        it.transcript.begin_answer(turn(1))
        await it.stream("one\ntwo", kind="thought")
        assert it.rows()[2].startswith("  ▸ thinking") and it.rows()[3:5] == ["", ""]


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("cancelled", "■ stopped"),
        ("length", "■ the token limit cut this off"),
        ("full", "■ cut off: why"),
        ("error", "✖ this reply failed: why"),
    ],
)
@played
async def test_a_reply_that_did_not_come_to_its_end_says_so(
    reason: FinishReason | Literal["full"], shown: str
):
    async with scene() as it:
        it.transcript.add_question(turn(1))
        it.transcript.begin_answer(turn(1))
        await it.stream("half an ans")
        detail = "why" if reason in ("error", "full") else ""
        full = reason == "full"
        done = Done("length" if full else reason, detail=detail, context_full=full)
        it.transcript.end_answer(done, turn(1))
        await it.settle()
        assert it.rows()[4] == f"  {shown}"


@played
async def test_tool_calls_are_lines_that_open():
    async with scene() as it:
        it.transcript.add_question(turn(1))
        it.transcript.begin_answer(turn(1))
        it.transcript.feed([ToolUse("weather", {"city": "Rome"}, "")])
        await it.settle()
        assert it.rows()[2] == '  → weather { "city": "Rome" }'
        await it.click("weather")
        assert it.rows()[2:5] == ["  → weather {", '    "city": "Rome"', "  }"]
        await it.show(turn(2, tool_calls=(ToolCall("again", {}),)))
        assert "  → again {}" in it.rows()


def framed(row: str) -> str:
    """What a row of a card says."""
    return row.strip(" ╭╮│╰╯─")


@played
async def test_a_card_is_as_wide_as_the_text_has_a_state_and_copies_without_its_frame():
    async with scene(width=60) as it:
        report = Report("Speeds", (Table(("name", "tok/s"), (("a", "23"),)),), "done · 3 s")
        it.transcript.add_report(report)
        await it.settle()
        top, _, last, bottom = [row.strip() for row in it.rows() if row]
        assert top.startswith("╭─ Speeds ──") and top.endswith("── done · 3 s ─╮")
        assert last.startswith("│ a     23") and last.endswith("│") and bottom.endswith("─╯")
        assert len({cells(row) for row in (top, last, bottom)}) == 1
        lines = it.transcript.blocks[0].lines(it.transcript._look)
        assert [copied(line).rstrip() for line in lines] == [
            "Speeds · done · 3 s",
            "name  tok/s",
            "a     23",
            "",
        ]


@played
async def test_notes_and_reports_stay_where_they_came_when_the_conversation_is_shown_again():
    async with scene(height=40) as it:
        await it.show(turn(1))
        it.transcript.add_note("take care", "warning")
        key = it.transcript.add_report(Report("Speeds", (Table(("name", "tok/s"), (("a", "23"),)),)))
        await it.show(turn(1), turn(2))
        rows = [row for row in it.rows() if row]
        assert rows[3] == "  ▲ take care"
        assert [framed(row) for row in rows[4:7]] == ["Speeds", "name  tok/s", "a     23"]
        assert rows[7].startswith("  ╰──") and rows[8].startswith("▌ question 2")
        it.transcript.update_report(key, Report("Speeds", (Lines(("done",)), Markdown("**bold**"))))
        await it.settle()
        assert [framed(row) for row in it.rows() if row][4:7] == ["Speeds", "done", "bold"]
        await it.show(turn(1), conversation=2)
        assert not any("Speeds" in row or "care" in row for row in it.rows())
        it.transcript.update_report(key, Report("Speeds", (Lines(("really done",)),)))
        await it.settle()
        assert "really done" in map(framed, it.rows())


@played
async def test_a_reply_goes_on_above_a_note_that_came_in_between():
    async with scene() as it:
        it.transcript.add_question(turn(1))
        it.transcript.begin_answer(turn(1))
        await it.stream("one ")
        it.transcript.add_note("a note")
        await it.stream("two")
        assert it.rows()[2:5] == ["  one two", "", "  · a note"]


@played
async def test_an_edited_question_takes_the_later_turns_away_and_a_retry_the_old_answer():
    async with scene() as it:
        await it.show(turn(1), turn(2), turn(3))
        it.transcript.add_question(turn(2, question="instead"))
        it.transcript.begin_answer(turn(2))
        await it.stream("new")
        assert [row.split("  ")[0] for row in it.rows() if row.startswith("▌")] == [
            "▌ question 1",
            "▌ instead",
        ]
        it.transcript.begin_answer(turn(2))
        await it.stream("newer")
        rows = it.rows()
        assert "  newer" in rows and "  new" not in rows and rows.count("▌ instead") <= 1


# --- growing ---


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@played
async def test_a_reply_that_came_in_pieces_is_shown_as_the_same_reply_loaded(seed: int):
    answer = f"{CODE}\n\n| a | b |\n|---|---|\n| {UNICODE} | x |\n\n1. one\n1. two {HOSTILE}\n"
    finished = turn(1, answer=answer, thinking=f"first\n{UNICODE}\n{HOSTILE}")
    choose = random.Random(seed)

    def pieces(text: str) -> list[str]:
        cuts = sorted({0, len(text), *(choose.randrange(len(text)) for _ in range(40))})
        return [text[a:b] for a, b in pairwise(cuts)]

    async with scene(70, 12) as it:
        it.transcript.add_question(finished)
        it.transcript.begin_answer(finished)
        await it.stream(*pieces(finished.thinking), kind="thought")
        for piece in pieces(answer):
            it.transcript.feed([said(piece)])
            if choose.random() < 0.2:
                await it.settle()
        it.transcript.end_answer(Done("stop"), finished)
        await it.settle()
        grown, fixed = it.all_rows(), it.transcript._rows.total
        it.transcript.show(state(conversation=2))
        await it.show(finished)
        assert it.all_rows() == grown
        assert it.transcript._rows.total == fixed == len(grown)


@pytest.mark.slow
@played
async def test_the_end_is_followed_until_the_reader_scrolls_up_and_then_nothing_moves():
    async with scene() as it:
        await it.show(*long_turns(5))
        it.transcript.add_question(turn(6))
        it.transcript.begin_answer(turn(6))
        await it.stream("\n\n".join(f"line {n}" for n in range(30)))
        assert it.rows()[-2] == "  line 29"
        it.transcript.scroll_relative(y=-7, animate=False)
        await it.settle()
        before = it.rows()
        await it.stream(*(f"\n\nmore {n}" for n in range(6)))
        assert it.rows()[:-1] == before[:-1]
        assert it.rows()[-1].endswith("↓ 12 new lines · end")
        await it.click("12 new lines")
        assert it.rows()[-2] == "  more 5" and it.transcript.follow
        await it.stream("\n\nlast")
        assert it.rows()[-2] == "  last"


@pytest.mark.slow
@played
async def test_scrolling_to_the_end_follows_again():
    async with scene() as it:
        await it.show(*long_turns(9))
        it.transcript.scroll_home(animate=False)
        await it.settle()
        assert not it.transcript.follow and it.rows()[0].startswith("▌ question 1 ")
        it.transcript.scroll_end(animate=False)
        await it.settle()
        it.transcript.add_note("the end")
        await it.settle()
        assert it.rows()[-2] == "  · the end"


@played
async def test_a_new_question_brings_the_end_into_sight():
    async with scene() as it:
        await it.show(*long_turns(9))
        it.transcript.scroll_home(animate=False)
        await it.settle()
        it.transcript.add_question(turn(10))
        await it.settle()
        assert it.rows()[-2].startswith("▌ question 10")


@played
async def test_dear_flushes_come_rarely_and_cheap_ones_thirty_times_a_second(monkeypatch: pytest.MonkeyPatch):
    async with scene() as it:
        delays: list[float] = []
        monkeypatch.setattr(it.transcript, "set_timer", lambda delay, _: delays.append(delay))
        for spent in (0.0, 0.01, 3.0):
            it.transcript._cost, it.transcript._flush_due = spent, False
            it.transcript.feed([said("x"), said("y")])
            it.transcript.feed([said("z")])
        assert delays == [pytest.approx(1 / 30), pytest.approx(0.1), 0.5]


@played
async def test_only_rows_that_changed_are_painted(monkeypatch: pytest.MonkeyPatch):
    async with scene() as it:
        it.transcript.add_question(turn(1))
        it.transcript.begin_answer(turn(1))
        await it.stream("one\n\ntwo\n\nthree")
        painted: list[tuple[int, int]] = []
        monkeypatch.setattr(it.transcript, "refresh_lines", lambda y, count=1: painted.append((y, count)))
        await it.stream(" four")
        assert painted == [(6, 2)]  # its row and the empty one after it
