"""Tables that are wider than the conversation: folded there, whole on a screen of their own."""

from pathlib import Path

from textual.events import MouseScrollDown

from qchat.tui.screens.table import TableScreen
from qchat.tui.text.markdown import whole_tables
from qchat.tui.text.markdown.lines import plain
from tests.tui.running_app import Running, chatting

NAMES = [f"column{number}" for number in range(12)]


def markdown(rows: int, mark: str = "") -> str:
    head = f"| {' | '.join(NAMES)} |\n|{'---|' * len(NAMES)}\n"
    return head + "".join(
        f"| {' | '.join(f'{mark}r{row}c{at}' for at in range(12))} |\n" for row in range(rows)
    )


WIDE = f"Two of them.\n\n{markdown(80)}\n> {markdown(2, 'second').replace(chr(10), chr(10) + '> ')}"
NARROW = "| a | b |\n|---|---|\n| 1 | 2 |"


def seen(screen: TableScreen) -> list[str]:
    return [screen.table.render_line(y).text for y in range(screen.table.size.height)]


async def opened(it: Running) -> TableScreen:
    await it.until(lambda: isinstance(it.app.screen, TableScreen) and it.app.screen.table.size.height)
    assert isinstance(it.app.screen, TableScreen)
    return it.app.screen


def test_whole_tables_have_every_column_and_each_row_in_one_line():
    first, second = whole_tables(WIDE)
    assert (first.rows, first.columns, second.rows) == (80, 12, 2)
    assert len(first.head) == 2 and len(first.body) == 80
    assert plain(first.body[7]).split(" │ ")[0].strip() == "r7c0"
    assert all(name in plain(first.head[0]) for name in NAMES)


def test_a_long_cell_wraps_in_a_column_of_its_own():
    (found,) = whole_tables(f"| a | b |\n|---|---|\n| {'word ' * 100}| 2 |")
    assert found.width < 80 and len(found.body) > 5 and found.rows == 1


def test_a_table_wider_than_the_window_scrolls_both_ways_on_a_screen_of_its_own(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "answer": WIDE}, size=(60, 20))
    async def check(it: Running) -> None:
        await it.ask("a table")
        transcript = it.screen.transcript
        await it.until(
            lambda: "⇔ wide table: click it" in transcript.render_line(transcript.size.height - 2).text
        )
        await it.pilot.press("shift+tab", "t")
        screen = await opened(it)
        assert seen(screen)[0].startswith("column0 │ column1") and "column11" not in seen(screen)[0]
        await it.pilot.press("shift+right", "pagedown")
        await it.until(lambda: screen.table.scroll_offset.y and "column11" in seen(screen)[0])
        head, rule, row, *_ = seen(screen)
        number = screen.table.scroll_offset.y
        assert head.startswith("column0 │") and rule.startswith("────")
        assert row.startswith(f"r{number}c0") and f"r{number}c11" in row
        await it.pilot.press("n")
        await it.until(lambda: seen(screen)[2].startswith("secondr0c0"))
        await it.pilot.press("left", "escape")
        await it.until(lambda: it.app.screen is it.screen)


def test_a_click_opens_the_table_under_the_pointer_and_the_wheel_scrolls_it_sideways(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "answer": WIDE}, size=(60, 20))
    async def check(it: Running) -> None:
        await it.ask("a table")
        transcript = it.screen.transcript
        rows = [transcript.render_line(y).text for y in range(transcript.size.height)]
        here = next(y for y, row in enumerate(rows) if "secondr1c3" in row)
        await it.pilot.click(transcript, (8, here))
        screen = await opened(it)
        assert screen.number == 1 and seen(screen)[2].startswith("secondr0c0")
        await it.pilot._post_mouse_events([MouseScrollDown], screen.table, (5, 5), shift=True)
        await it.until(lambda: screen.table.scroll_offset.x)


def test_a_table_that_fits_has_no_hint_and_text_without_one_opens_nothing(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "answer": NARROW}, {"method": "send", "answer": "No table."})
    async def check(it: Running) -> None:
        await it.ask("a table")
        assert "⇔" not in "".join(it.screen.transcript.render_line(y).text for y in range(20))
        await it.ask("none")
        await it.pilot.press("shift+tab", "t")
        await it.until(lambda: "no table here" in it.keys)
