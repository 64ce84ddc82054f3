"""The conversation on a screen: sizes, themes, many turns; keys, code, finding and selecting."""

import re

import pytest
from rich.cells import cell_len
from textual.geometry import Offset
from textual.selection import Selection

from qchat.core.conversation.summary import ToolCall, Turn
from qchat.core.events import Done
from qchat.tui.text.report import Lines, Markdown, Report
from qchat.tui.widgets.transcript.messages import (
    CopyRequested,
    EditRequested,
    FindRequested,
    ForkRequested,
    MenuRequested,
    RetryRequested,
    SiblingRequested,
)
from tests.tui.transcript_stage import CODE, HOSTILE, UNICODE, long_turns, played, scene, state, turn

# --- size, theme, many turns ---


@pytest.mark.slow
@played
async def test_two_thousand_turns_cost_a_screen_until_there_is_time():
    async with scene() as it:
        it.transcript.show(state(*long_turns(2_000)))
        known = [i for i in range(6_000) if not it.transcript._rows.is_guessed(i)]
        assert len(known) < 120 and known[-1] == 5_999
        await it.settle()
        assert "question 2000" in "\n".join(it.rows())
        for part in (0.5, 0.1, 0.9):
            it.transcript.scroll_to(y=it.transcript.virtual_size.height * part, animate=False)
            await it.settle()
            numbers = [int(n) for n in re.findall(r"(?:question|answer) (\d+)", "\n".join(it.rows()))]
            assert numbers == sorted(numbers) and abs(numbers[0] - 2_000 * part) < 400
        it.transcript.scroll_home(animate=False)
        await it.settle()
        assert it.rows()[0].startswith("▌ question 1 ")
        assert len(it.transcript._built) < 400


@pytest.mark.slow
@played
async def test_measuring_what_is_out_of_sight_moves_nothing_in_sight():
    async with scene() as it:
        await it.show(*long_turns(150))
        it.transcript.scroll_to(y=it.transcript.virtual_size.height // 2, animate=False)
        await it.settle()
        before = it.rows()
        await it.measured()
        await it.settle()
        assert it.rows() == before
        rows = it.transcript._rows
        heights = [block.height(it.transcript._look) for block in it.transcript.blocks]
        assert [rows.height(n) for n in range(len(rows))] == heights
        assert it.transcript.virtual_size.height == sum(heights)


@pytest.mark.slow
@played
async def test_another_width_keeps_the_block_that_is_read_at_the_top():
    async with scene() as it:
        await it.show(*long_turns(60))
        await it.measured()
        block = it.transcript.blocks[90]
        it.transcript.go_to(block, 0)
        await it.settle()
        top = it.rows()[0]
        for width in (100, 33, 60):
            await it.pilot.resize_terminal(width, 20)
            await it.settle()
            assert it.rows()[0].split("  ")[0] == top.split("  ")[0]
            assert all(cell_len(it.transcript.render_line(y).text) == width for y in range(20))


@played
async def test_another_theme_lays_nothing_out_again():
    async with scene() as it:
        await it.show(turn(1, answer=CODE))
        lines = it.transcript.blocks[2].lines(it.transcript._look)
        before = [it.transcript.render_line(y) for y in range(20)]
        it.app.theme = "dracula"
        await it.settle()
        plain = next(s.style for s in it.transcript.strip(it.where("  text")) if "text" in s.text)
        wanted = it.app.get_css_variables()["foreground"]
        assert plain and plain.color and plain.color.name.lower() == wanted.lower()
        assert (
            plain.bgcolor and plain.bgcolor.name.lower() == it.app.get_css_variables()["background"].lower()
        )
        after = [it.transcript.render_line(y) for y in range(20)]
        assert [strip.text for strip in before] == [strip.text for strip in after] and before != after
        assert it.transcript.blocks[2].lines(it.transcript._look) is lines


@pytest.mark.parametrize("theme", ["textual-ansi", "textual-dark", "ansi-dark"])
@played
async def test_every_theme_can_be_painted(theme: str):
    async with scene() as it:
        if theme in it.app.available_themes:
            it.app.theme = theme
        await it.show(turn(1, answer=CODE))
        assert it.app.export_screenshot()


def hostile_turn() -> Turn:
    nasty = f"{HOSTILE} {UNICODE} " + "x" * 300
    parts = (
        nasty,
        f"- {nasty}",
        f"```{nasty}\n{nasty}\n```",
        f"| {UNICODE} | b |\n|--|--|\n| {nasty} | c |",
        f"> {nasty}",
    )
    call = ToolCall(nasty, {nasty.replace("\udc80", ""): [nasty]})
    return turn(
        1,
        question=nasty,
        thinking=nasty,
        answer="\n\n".join(parts),
        tool_calls=(call,),
        siblings=(1, 2),
        node=1,
    )


@pytest.mark.parametrize("width", [8, 16, 41, 120])
@played
async def test_every_strip_has_the_width_of_the_widget_and_nothing_raw_in_it(width: int):
    async with scene(width, 30) as it:
        it.transcript.thoughts = "open"
        await it.show(hostile_turn())
        it.transcript.add_note(HOSTILE * 9, "error")
        it.transcript.add_report(Report(HOSTILE, (Lines((HOSTILE, UNICODE * 9)), Markdown(f"- {HOSTILE}"))))
        it.transcript.fold(it.transcript.blocks[3])
        await it.settle()
        text = ""
        for y in range(it.transcript._rows.total):
            strip = it.transcript.strip(y)
            assert sum(segment.cell_length for segment in strip) == width
            text += strip.text
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


@played
async def test_a_line_of_a_hundred_thousand_letters_is_broken_into_rows():
    async with scene() as it:
        it.transcript.add_question(turn(1))
        it.transcript.begin_answer(turn(1))
        await it.stream("x" * 50_000, "x" * 50_000)
        it.transcript.end_answer(Done("stop"), turn(1, answer="x" * 100_000))
        await it.settle()
        assert it.transcript._rows.total > 100_000 // 57
        assert it.rows()[-2].strip("x ") == ""


# --- keys ---


@played
async def test_the_cursor_goes_from_block_to_block_and_shows_where_it_is():
    async with scene() as it:
        await it.show(turn(1), turn(2))
        await it.press("k", "up")
        assert it.transcript.cursor is it.transcript.blocks[3]
        barred = [row for row in it.rows() if row.startswith("┃")]
        assert len(barred) == 1 and "question 2" in barred[0]
        await it.press("j", "down", "down", "down")
        assert it.transcript.cursor is it.transcript.blocks[5]


@pytest.mark.slow
@played
async def test_a_block_taller_than_the_screen_is_read_through_before_the_next():
    async with scene(height=10) as it:
        await it.show(turn(1, answer="\n\n".join(f"line {n}" for n in range(20))), turn(2))
        it.transcript.go_to(it.transcript.blocks[2], 0)
        it.transcript._cursor = it.transcript.blocks[2]
        seen = []
        while it.transcript.cursor is it.transcript.blocks[2]:
            seen += it.rows()
            await it.press("j")
        assert {f"line {n}" for n in range(20)} <= {row.lstrip("┃ ") for row in seen}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "kind", "told"),
    [
        (("c",), CopyRequested, {"text": "answer 2", "what": "answer 2"}),
        (("k", "k", "c"), CopyRequested, {"text": "question 2", "what": "question 2"}),
        (("k", "c"), CopyRequested, {"text": "thought 2", "what": "thought 2"}),
        (("e",), EditRequested, {"turn": 2}),
        (("r",), RetryRequested, {"turn": 2}),
        (("f",), ForkRequested, {"turn": 2}),
        (("enter",), MenuRequested, {"turn": 2}),
        (("left",), SiblingRequested, {"turn": 2, "step": -1}),
        (("right",), SiblingRequested, {"turn": 2, "step": 1}),
        (("slash",), FindRequested, {}),
    ],
)
@played
async def test_a_key_asks_for_what_is_to_be_done_with_the_block(
    keys: tuple[str, ...], kind: type, told: dict
):
    async with scene() as it:
        await it.show(turn(1), turn(2))
        await it.press(*keys)
        assert [type(ask) for ask in it.app.asked] == [kind]
        assert {name: getattr(it.app.asked[0], name) for name in told} == told


@played
async def test_keys_can_be_remapped_by_their_action():
    async with scene() as it:
        await it.show(turn(1))
        it.app.set_keymap({"transcript.copy": "x"})
        await it.press("c", "x")
        assert [ask.text for ask in it.app.asked] == ["answer 1"]


@played
async def test_space_opens_and_folds_the_thought_of_the_turn():
    async with scene() as it:
        await it.show(turn(1), turn(2))
        await it.press("space")
        assert [row for row in it.rows() if row.startswith("  thought")] == ["  thought 2"]
        await it.press("space")
        assert not [row for row in it.rows() if row.startswith("  thought")]


# --- code, finding, selecting ---


@played
async def test_code_is_copied_from_its_fence_and_by_key_one_after_the_other():
    async with scene(height=30) as it:
        await it.show(turn(1, answer=CODE))
        await it.press("y", "y", "y")
        assert [ask.text for ask in it.app.asked] == [
            "def f(x):\n\treturn x\n",
            "ls -l\n",
            "def f(x):\n\treturn x\n",
        ]
        it.app.asked.clear()
        y = it.where("┌ sh")
        x = it.rows()[y].index("copy")
        await it.pilot.click(it.transcript, offset=Offset(x, y))
        await it.settle()
        assert [(ask.text, ask.what) for ask in it.app.asked] == [("ls -l\n", "code 2 of 2")]


@played
async def test_finding_counts_marks_and_steps_through_folded_thoughts_too():
    async with scene() as it:
        await it.show(*long_turns(30))
        assert it.transcript.find("THOUGHT 17") == 1
        it.transcript.find_next()
        await it.settle()
        row = it.where("thought 17")
        marked = [segment for segment in it.transcript.render_line(row) if segment.text == "thought 17"]
        assert marked and marked[0].style is not None and marked[0].style.reverse
        assert it.transcript.find("question 1") == 11
        it.transcript.scroll_home(animate=False)
        await it.settle()
        seen = []
        for step in (it.transcript.find_next, it.transcript.find_next, it.transcript.find_previous):
            step()
            await it.settle()
            seen.append(it.transcript.cursor.text if it.transcript.cursor else "")
        assert seen == ["question 1", "question 10", "question 1"]
        assert it.transcript.find("") == it.transcript.find("nowhere") == 0


@played
async def test_a_match_over_the_end_of_a_row_is_marked_on_both():
    async with scene(30) as it:
        await it.show(turn(1, answer="alpha beta gamma delta epsilon zeta"))
        block = it.transcript.blocks[2]
        it.transcript.find("delta epsilon")
        assert {mark.row for mark in it.transcript._marks_of(block)} == {0, 1}


@played
async def test_a_selection_is_copied_as_its_source():
    async with scene(50, 40) as it:
        await it.show(turn(1, answer=CODE + "\n\n" + "one two three four " * 5))
        top, bottom = it.where("text"), it.transcript._rows.total
        it.app.screen.selections = {it.transcript: Selection(Offset(0, top), Offset(99, bottom))}
        await it.settle()
        text = it.app.screen.get_selected_text() or ""
        assert text.strip() == CODE.split("\n\n", 1)[1] + "\n\n" + ("one two three four " * 5).strip()
        assert any(s.style and s.style.bgcolor for s in it.transcript.render_line(top) if "text" in s.text)


@played
async def test_a_drag_of_the_mouse_selects():
    async with scene() as it:
        await it.show(turn(1, answer="select some of these words"))
        y = it.where("select")
        await it.pilot.mouse_down(it.transcript, offset=Offset(9, y))
        await it.pilot.hover(it.transcript, offset=Offset(13, y))
        await it.pilot.mouse_up(it.transcript, offset=Offset(13, y))
        await it.settle()
        assert it.app.screen.get_selected_text() in ("some", "some ")
