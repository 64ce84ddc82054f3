"""Pictures in the app: at once, in half blocks or by Kitty's protocol, whatever happens to them."""

import hashlib
import os
from pathlib import Path

import pytest
from PIL import Image
from rich.style import Style
from textual.drivers.headless_driver import HeadlessDriver

from qchat.tui.widgets.transcript.blocks import Question
from tests.tui.conversing import talk
from tests.tui.kitty_terminal import KittyTerminal
from tests.tui.running_app import ENDLESS, Running, chatting, quick_keys

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FOUR = {(0, 0): RED, (0, -1): GREEN, (-1, 0): BLUE, (-1, -1): WHITE}


def draw(path: Path, size: tuple[int, int] = (1280, 800), turn: int = 0) -> Path:
    """Write a picture of four quarters of colours, which begin with the one of this number."""
    colours = [*FOUR.values()][turn:] + [*FOUR.values()][:turn]
    image = Image.new("RGB", (2, 2))
    image.putdata(colours)
    image.resize(size, Image.Resampling.NEAREST).save(path)
    return path


class Drawn:
    """The running app in front of a terminal that knows the protocol."""

    def __init__(self, it: Running, *, behind_tmux: bool = False):
        self.it, self.terminal = it, KittyTerminal(behind_tmux=behind_tmux)
        self.transcript = it.screen.transcript
        self.transcript.gallery._write = self.terminal.feed

    @classmethod
    async def asked(cls, it: Running) -> "Drawn":
        """Ask about a picture, and return what is drawn once it is there."""
        drawn = cls(it)
        await it.ask("@one.png what is it?")
        await drawn.until_drawn()
        return drawn

    def look(self) -> KittyTerminal:
        """Paint the screen as the app would write it."""
        self.terminal.paint(
            strip.render(self.it.app.console) for strip in self.it.app.screen._compositor.render_strips()
        )
        return self.terminal

    def box(self) -> list[tuple[int, ...]]:
        """Return the colours in the corners of the only picture on the screen, which must be whole."""
        parts = self.look().parts
        rows, columns = sorted({row for row, _ in parts}), sorted({column for _, column in parts})
        assert len(parts) == len(rows) * len(columns), "cells are missing"
        return [self.terminal.shown(rows[row], columns[column]) for row, column in FOUR]

    async def until_drawn(self, count: int = 1) -> None:
        await self.it.until(lambda: len({part.number for part in self.look().parts.values()}) == count)


@pytest.fixture
def kitty(monkeypatch: pytest.MonkeyPatch) -> None:
    _terminal(monkeypatch, "xterm-kitty")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(Path("one.png"))
    draw(Path("two.png"), turn=1)


def _terminal(patch: pytest.MonkeyPatch, term: str, colours: str = "truecolor") -> None:
    for name in ("TMUX", "STY", "ZELLIJ", "TERM_PROGRAM", "NO_COLOR"):
        patch.delenv(name, raising=False)
    patch.setenv("TERM", term)
    patch.setenv("COLORTERM", colours)
    Style._add.cache_clear()  # a style keeps the codes of the colours that it was first written with


def rows(it: Running) -> list[str]:
    return [
        it.screen.transcript.render_line(y).text.rstrip() for y in range(it.screen.transcript.size.height)
    ]


def questions(it: Running) -> list[Question]:
    return [block for block in it.screen.transcript.blocks if isinstance(block, Question)]


def test_pictures_appear_with_the_question_and_learn_their_tokens_from_the_reply(tmp_path: Path):
    slow = {"method": "send", "answer": "word " * 100, "seconds": 0.1}  # too few to scroll

    @chatting(tmp_path, slow, size=(100, 50))
    async def check(it: Running) -> None:
        await it.say("@one.png what is it?")
        await it.until(lambda: any("▨ one.png · 1,280 × 800" in row for row in rows(it)))
        assert it.chat.busy, "the reply is still being written"
        assert [one.tokens for one in questions(it)[0].pictures] == [0], "nobody has counted them"
        assert any("▀▀▀" in row for row in rows(it))
        await it.until(lambda: it.phase == "answering")  # a question without any reply would be given back
        it.chat.stop()
        await it.idle()
        await it.until(lambda: any("▨ one.png · 1,280 × 800 · 1.0k tokens" in row for row in rows(it)))


def test_a_retry_and_an_edit_show_the_pictures_from_the_beginning(tmp_path: Path):
    steps = [
        {"method": "send", "answer": "red"},
        {**ENDLESS, "method": "retry"},
        {**ENDLESS, "method": "edit"},
    ]

    @chatting(tmp_path, *steps)
    async def check(it: Running) -> None:
        await it.ask("@one.png what is it?")
        for line in ("/retry", "/edit 1 and now?"):
            await it.say(line)
            await it.until(lambda: it.phase == "answering")
            assert [picture.name for picture in questions(it)[-1].pictures] == ["one.png"]
            it.chat.stop()
            await it.idle()


def test_pictures_that_an_edit_names_replace_those_of_the_question(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("@one.png @two.png which?")
        for text, names in (
            ("@one.png alone?", ["one.png"]),
            ("and now?", ["one.png"]),
            ("@two.png?", ["two.png"]),
        ):
            await it.say(f"/edit 1 {text}")
            await it.until(lambda text=text: it.chat.state.turns[0].question == text)
            await it.idle()
            assert [picture.name for picture in questions(it)[0].pictures] == names
        asked = [edit["images"] for edit in it.engine.asked("edit")]
        assert asked == [[str(Path("one.png").absolute())], None, [str(Path("two.png").absolute())]]
        await it.say("/undo")
        await it.until(lambda: not it.chat.state.turns)
        await it.idle()
        assert "4 branches" in it.screen.header.render_line(0).text


def test_a_file_that_cannot_be_read_is_left_to_the_engine(tmp_path: Path):
    Path("bad.png").write_bytes(b"no picture")

    @chatting(
        tmp_path, {"method": "send", "error": {"kind": "UsageError", "message": "bad.png is not a PNG"}}
    )
    async def check(it: Running) -> None:
        await it.say("@bad.png what is it?")
        await it.until(lambda: ("error", "bad.png is not a PNG") in it.said)


@pytest.mark.usefixtures("kitty")
def test_kitty_draws_the_picture_that_it_was_sent(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "answer": "red"})
    async def check(it: Running) -> None:
        drawn = await Drawn.asked(it)
        assert drawn.box() == [*FOUR.values()]
        (kept,) = drawn.terminal.pictures.values()
        assert (kept.columns, kept.rows) == (32, 10)
        assert max(kept.image.size) <= 800
        await it.ask("and now?")
        assert drawn.terminal.sent == 1, "each picture is sent once"


@pytest.mark.usefixtures("kitty")
def test_two_pictures_have_numbers_of_their_own(tmp_path: Path):
    @chatting(tmp_path, size=(100, 50))
    async def check(it: Running) -> None:
        drawn = Drawn(it)
        await it.ask("@one.png @two.png which?")
        await drawn.until_drawn(2)
        tops = sorted(
            (at, part) for at, part in drawn.terminal.parts.items() if (part.row, part.column) == (0, 0)
        )
        assert [drawn.terminal.shown(*at) for at, _ in tops] == [RED, GREEN]


@pytest.mark.parametrize(("term", "colours"), [("xterm-kitty", ""), ("xterm-ghostty", "truecolor")])
def test_numbers_fit_the_colours_that_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str, colours: str
):
    _terminal(monkeypatch, term, colours)

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = await Drawn.asked(it)
        assert drawn.box() == [*FOUR.values()]
        (number,) = drawn.terminal.pictures
        assert (number & 0xFFFFFF < 256) == (not colours)


@pytest.mark.usefixtures("kitty")
def test_half_a_picture_may_be_out_of_sight(tmp_path: Path):
    @chatting(tmp_path, size=(100, 24))
    async def check(it: Running) -> None:
        drawn = await Drawn.asked(it)
        await it.say("/set panes off")
        for _ in range(4):
            await it.ask("and now?")
        it.screen.transcript.scroll_home(animate=False)
        await drawn.until_drawn()
        it.screen.transcript.scroll_to(y=5, animate=False)
        await it.pilot.pause()
        parts = drawn.look().parts
        left = {part.row for part in parts.values()}
        assert left == set(range(min(left), 10)), "the lower rows are those in sight"
        assert 0 < min(left) < 9
        assert drawn.terminal.shown(max(row for row, _ in parts), min(column for _, column in parts)) == BLUE


@pytest.mark.usefixtures("kitty")
def test_a_resize_a_theme_and_a_dialog_leave_it_whole(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = await Drawn.asked(it)
        await it.pilot.resize_terminal(70, 28)
        await it.until(lambda: drawn.transcript.size.width == 70)
        assert drawn.box() == [*FOUR.values()]
        for theme in ("day", "terminal", "night"):
            await it.say(f"/theme {theme}")
            await it.until(lambda theme=theme: it.app.theme.endswith(theme))
            await it.pilot.pause()
            assert drawn.box() == [*FOUR.values()]
        await it.pilot.press("f1")
        await it.pilot.press("escape")
        await it.until(lambda: it.app.screen is it.screen)
        assert drawn.box() == [*FOUR.values()]
        assert drawn.terminal.sent == 1


@pytest.mark.usefixtures("kitty")
def test_a_selection_neither_hides_nor_copies_a_picture(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = await Drawn.asked(it)
        it.screen.transcript.text_select_all()
        await it.pilot.pause()
        assert drawn.box() == [*FOUR.values()]
        assert "\U0010eeee" not in (it.screen.get_selected_text() or "")


@pytest.mark.usefixtures("kitty")
def test_pictures_are_deleted_with_their_turns(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = await Drawn.asked(it)
        await it.say("/retry")
        await it.idle()
        assert drawn.box() == [*FOUR.values()]
        assert drawn.terminal.sent == 1, "a retry keeps it"
        await it.say("/undo")
        await it.until(lambda: not drawn.terminal.pictures)
        await it.idle()
        it.prompt.put("")
        await it.ask("@one.png what is it?")
        await drawn.until_drawn()
        await it.say("/new")
        await it.until(lambda: not drawn.terminal.pictures)


@pytest.mark.usefixtures("kitty")
def test_a_conversation_that_is_reopened_shows_the_stored_pictures(tmp_path: Path):
    from qchat.core import Store

    store = Store(tmp_path / "store.db")
    number = talk(store, "one")
    data = Path("one.png").read_bytes()
    with store._database.write() as execute:
        digest = hashlib.sha256(data).hexdigest()
        execute("INSERT INTO pictures VALUES (?, ?, ?)", number, digest, data)

    @chatting(tmp_path, store=store)
    async def check(it: Running) -> None:
        drawn = await Drawn.asked(it)
        await it.say("/new")
        await it.until(lambda: not drawn.terminal.pictures)
        it.chat.picture_files._paths.clear()
        Path("one.png").unlink()
        await it.chat.open(number)
        await drawn.until_drawn()
        assert drawn.box() == [*FOUR.values()]


@pytest.mark.usefixtures("kitty")
def test_a_picture_whose_file_is_gone_stays_in_half_blocks(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = Drawn(it)
        it.screen._read_picture = lambda _: None  # pyright: ignore
        it.screen.transcript.gallery._load = lambda _: None
        await it.ask("@one.png what is it?")
        await it.until(it.is_at_rest)
        assert any("▀▀▀" in row for row in rows(it))
        assert drawn.terminal.sent == 0


@pytest.mark.usefixtures("kitty")
def test_another_program_gets_a_terminal_without_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HeadlessDriver, "can_suspend", True)
    monkeypatch.setattr(HeadlessDriver, "suspend_application_mode", lambda _: None)
    monkeypatch.setattr(HeadlessDriver, "resume_application_mode", lambda _: None)

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = await Drawn.asked(it)
        with it.app.suspend():
            assert not drawn.terminal.pictures
        await it.until(lambda: drawn.terminal.pictures)
        assert drawn.box() == [*FOUR.values()]
        drawn.terminal.pictures.clear()  # as a terminal that was reset
        await it.pilot.press("ctrl+l")
        assert drawn.box() == [*FOUR.values()]


@pytest.mark.usefixtures("kitty")
def test_leaving_deletes_the_pictures(tmp_path: Path):
    terminals: list[KittyTerminal] = []

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = Drawn(it)
        terminals.append(drawn.terminal)
        await it.ask("@one.png what is it?")
        await drawn.until_drawn()
        await it.app.action_leave()

    assert terminals[0].sent == 1
    assert not terminals[0].pictures


@pytest.mark.usefixtures("kitty")
@pytest.mark.parametrize("how", ["blocks", "off"])
def test_the_setting_decides_and_takes_effect_at_once(tmp_path: Path, how: str):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = await Drawn.asked(it)
        await it.say(f"/set pictures {how}")
        await it.until(lambda: not drawn.terminal.pictures)
        await it.until(lambda: not drawn.look().parts)
        assert any("▀▀▀" in row for row in rows(it)) == (how == "blocks")
        await it.say("/set pictures auto")
        await drawn.until_drawn()
        assert drawn.box() == [*FOUR.values()]


@pytest.mark.parametrize(
    ("term", "environment", "drawn_in_blocks"),
    [
        ("xterm-256color", {}, True),
        ("xterm-kitty", {"NO_COLOR": "1"}, False),
        ("xterm-kitty", {"TEXTUAL_COLOR_SYSTEM": "standard"}, True),
        ("xterm-kitty", {"ZELLIJ": "0"}, True),
        ("xterm-kitty", {"STY": "1"}, True),
    ],
)
def test_other_terminals_are_sent_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    term: str,
    environment: dict[str, str],
    drawn_in_blocks: bool,
):
    _terminal(monkeypatch, term)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "TEXTUAL_COLOR_SYSTEM" in environment:
        monkeypatch.setattr("textual.constants.COLOR_SYSTEM", "standard")

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = Drawn(it)
        await it.ask("@one.png what is it?")
        await it.until(it.is_at_rest)
        assert drawn.terminal.sent == 0
        assert not drawn.look().parts
        assert any("▨ one.png" in row for row in rows(it))
        assert any("▀▀▀" in row for row in rows(it)) == drawn_in_blocks


def test_tmux_passes_pictures_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where it has no 24-bit colours it writes the nearest of 256, so numbers are of those."""
    _terminal(monkeypatch, "tmux-256color")
    (tmp_path / "tmux").write_text("#!/bin/sh\necho on xterm-kitty 256,title\n")
    (tmp_path / "tmux").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TMUX", "/tmp/socket,1,0")

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        drawn = Drawn(it, behind_tmux=True)
        await it.ask("@one.png what is it?")
        await it.until(lambda: drawn.terminal.pictures)
        assert [number & 0xFFFFFF < 256 for number in drawn.terminal.pictures] == [True]
        await it.say("/new")
        await it.until(lambda: not drawn.terminal.pictures)
