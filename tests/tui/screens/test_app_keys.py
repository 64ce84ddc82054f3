"""The app where a slip of the finger would lose or mislead: editor, completion, find, labels."""

from pathlib import Path

import pytest
from textual.drivers.headless_driver import HeadlessDriver
from textual.widgets import OptionList

from qchat.core import Store
from qchat.tui.commands.stats import stats_report
from qchat.tui.screens.dialogs import Choose
from qchat.tui.text.report import report_text
from qchat.tui.user import editor
from qchat.tui.widgets.choices import Choices
from qchat.tui.widgets.transcript.blocks import Answer, ModelChange, Question
from tests.tui.conversing import talk
from tests.tui.running_app import Running, chatting, quick_keys

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")


# --- the editor ---


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whether the terminal was lent out and taken back."""
    calls: list[str] = []
    monkeypatch.setattr(HeadlessDriver, "can_suspend", True)
    monkeypatch.setattr(HeadlessDriver, "suspend_application_mode", lambda _: calls.append("lent"))
    monkeypatch.setattr(HeadlessDriver, "resume_application_mode", lambda _: calls.append("back"))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("command", ["no-such-editor --wait", "/nonexistent/editor", "'open", "''"])
@pytest.mark.parametrize("way", ["ctrl+g", "/edit"])
def test_an_editor_that_cannot_start_leaves_the_screen_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lent: list[str], command: str, way: str
):
    monkeypatch.setenv("VISUAL", "")
    monkeypatch.setenv("EDITOR", command)

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        if way == "/edit":
            await it.say(way)
        else:
            await it.pilot.press(*"draft", way)
        await it.until(lambda: it.said)
        kind, sentence = it.said[0]
        assert kind == "error"
        assert "cannot be started" in sentence or "$EDITOR is not a command" in sentence
        assert not lent
        assert it.prompt.text == ("" if way == "/edit" else "draft")


@pytest.mark.parametrize("failure", [editor.UsageError("the editor left no text"), OSError(5, "broken")])
def test_whatever_fails_while_the_terminal_is_lent_the_app_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lent: list[str], failure: Exception
):
    def fail(*_: object) -> int:
        raise failure

    monkeypatch.setenv("VISUAL", "true")
    monkeypatch.setattr(editor, "open_file", fail)

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.pilot.press(*"draft", "ctrl+g")
        await it.until(lambda: it.said)
        assert lent == ["lent", "back"]
        assert it.said[0][0] == "error"
        await it.pilot.press("!")
        await it.until(lambda: it.prompt.text == "draft!")


# --- completion ---


@pytest.mark.parametrize(
    ("keys", "ran"),
    [
        ([*"/stat", "tab", "enter"], "/stats"),
        ([*"/thin", "tab", "enter"], "/think"),
        ([*"/theme", "tab", "enter"], "/theme"),
        ([*"/stat", "tab", "down", "up", "enter"], "/stats json"),
        ([*"/thin", "tab", "down", "enter"], "/think off"),
        ([*"/stats ", "enter"], "/stats"),
        ([*"/stat", "enter"], "/stats"),
    ],
)
def test_enter_runs_the_line_and_a_row_only_after_an_arrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], ran: str
):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        lines: list[str] = []
        monkeypatch.setattr(it.screen, "run_line", lines.append)
        await it.pilot.press(*keys)
        await it.until(lambda: lines)
        assert [line.strip() for line in lines] == [ran]


# --- lists without colours ---


def marked_options(options: OptionList) -> set[int]:
    """The options of a list that are underlined from edge to edge."""
    rows = range(min(options.size.height, len(options._lines)))
    marked = [y for y in rows if all(part.style and part.style.underline for part in options.render_line(y))]
    return {options._lines[options.scroll_offset.y + y][0] for y in marked}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [["f2"], ["f2", "down"], ["ctrl+p"], ["ctrl+s", "down"], [*"/he"]])
def test_without_colours_lists_show_the_chosen_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str]
):
    monkeypatch.setenv("NO_COLOR", "1")
    store = Store(tmp_path / "conversations.db")
    for question in ("one", "two"):
        talk(store, question, "answer")

    @chatting(tmp_path, store=store)
    async def check(it: Running) -> None:
        assert it.app.no_color
        await it.pilot.press(*keys)

        def shown() -> list[OptionList]:
            return [one for one in it.app.screen.query(OptionList) if one.display and one.option_count]

        await it.until(lambda: shown() and marked_options(shown()[0]))
        assert marked_options(shown()[0]) == {shown()[0].highlighted}


# --- find ---


def found_cells(it: Running) -> int:
    """How many cells on the screen are marked as found."""
    transcript = it.screen.transcript
    parts = [part for y in range(transcript.size.height) for part in transcript.render_line(y)]
    return sum(len(part.text) for part in parts if part.style and part.style.reverse)


def test_the_marks_of_find_go_when_it_is_closed(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "answer": "king, king and king."})
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.pilot.press("ctrl+f", *"king")
        assert "3 found" in it.keys and "esc close" in it.keys
        await it.until(lambda: found_cells(it) == 12)
        await it.pilot.press("enter", "enter")
        await it.until(lambda: "2 of 3" in it.keys)
        await it.pilot.press("down")
        await it.until(lambda: "3 of 3" in it.keys and "enter before" in it.keys)
        await it.pilot.press("escape")
        assert "enter send" in it.keys
        assert not found_cells(it)
        await it.ask("two")
        assert not found_cells(it)
        await it.pilot.press("ctrl+f")  # the text is still there
        await it.until(lambda: "6 found" in it.keys and found_cells(it) == 24)


def test_a_commands_marks_go_with_esc_and_nothing_found_marks_nothing(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "answer": "a queen."}, {"method": "send", "answer": "a king."})
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.say("/find king")
        await it.until(lambda: it.said)
        await it.ask("two")
        assert not found_cells(it)
        await it.say("/find king")
        await it.until(lambda: found_cells(it) >= 4)
        await it.pilot.press("escape")
        assert not found_cells(it)
        assert it.app.screen is it.screen


# --- labels, and answers in sight ---


def seen(it: Running) -> str:
    """What is on the screen of the conversation."""
    transcript = it.screen.transcript
    return "\n".join(transcript.render_line(y).text for y in range(transcript.size.height))


@pytest.mark.parametrize("again", ["/retry", "r", "/edit 1 other"])
def test_several_answers_are_counted_at_once(tmp_path: Path, again: str):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        assert "‹ 1/1 ›" not in seen(it)
        if again.startswith("/"):
            await it.say(again)
        else:
            await it.pilot.press("shift+tab", again)
        await it.until(lambda: "‹ 2/2 ›" in seen(it))
        await it.idle()


@pytest.mark.slow
def test_the_key_bar_and_the_header_follow_commands_at_once(tmp_path: Path):
    @chatting(tmp_path, store=Store(tmp_path / "conversations.db"))
    async def check(it: Running) -> None:
        await it.say("/budget 20")
        await it.until(lambda: "think:20" in it.keys)
        await it.say("/think off")
        await it.until(lambda: "think:off" in it.keys)
        await it.say("/set think on")
        await it.until(lambda: "think:off" not in it.keys and "think:" in it.keys)
        await it.ask("one")
        for line in ("/rename Another title", "/save Third title"):
            await it.say(line)
            title = line.partition(" ")[2]
            await it.until(lambda title=title: title in it.screen.header.render_line(0).text)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["/about", "/history", "/hlep", "/stats", "/show system"])
def test_what_a_command_says_is_scrolled_into_sight(tmp_path: Path, line: str):
    @chatting(tmp_path, {"method": "send", "answer": "word\n\n" * 60})
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.pilot.press("ctrl+home")
        await it.until(lambda: not it.screen.transcript.follow)
        await it.say(line)
        await it.until(lambda: it.screen.transcript.follow or it.app.screen is not it.screen)


def test_what_only_confirms_is_said_in_the_key_bar_and_leaves_a_reader_in_place(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "answer": "word\n\n" * 60})
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.pilot.press("ctrl+home")
        await it.until(lambda: not it.screen.transcript.follow)
        notes = it.screen.transcript.notes
        await it.say("/think off")
        await it.until(lambda: "thinking is off, thoughts are folded" in it.keys)
        assert not it.screen.transcript.follow and it.screen.transcript.notes == notes


def test_what_others_say_leaves_a_reader_in_place(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "answer": "word\n\n" * 60})
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.pilot.press("ctrl+home")
        await it.until(lambda: not it.screen.transcript.follow)
        it.front.note("from elsewhere")
        assert it.screen.transcript.unseen
        assert not it.screen.transcript.follow


def test_a_compaction_without_room_leaves_the_prompt_empty(tmp_path: Path):
    error = {"kind": "ContextLengthExceeded", "message": "the prompt has 9 tokens", "exit_code": 4}
    steps = [{"method": "send"}, {"method": "send"}, {"method": "send", "events": [], "error": error}]

    @chatting(tmp_path, *steps)
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.ask("two")
        await it.say("/compact")
        await it.until(lambda: it.said)
        assert it.said == [("error", "/compact has no room for a summary: the prompt has 9 tokens")]
        assert it.prompt.text == ""
        assert "Summarize" not in seen(it)


# --- which model wrote what ---


def test_the_conversation_shows_where_another_model_goes_on(tmp_path: Path):
    one, two = (str(tmp_path / name) for name in ("one-4bit", "two-8bit"))
    for folder in (one, two):
        Path(folder).mkdir()

    def rules(it: Running) -> list[tuple[int, str]]:
        return [(b.turn, b.text) for b in it.screen.transcript.blocks if isinstance(b, ModelChange)]

    def places(it: Running) -> list[str]:
        blocks = it.screen.transcript.blocks
        return [type(b).__name__ for b in blocks if isinstance(b, ModelChange | Question | Answer)]

    @chatting(tmp_path, store=Store(tmp_path / "conversations.db"))
    async def check(it: Running) -> None:
        await it.say(f"/load {one}")
        await it.until(lambda: it.chat.model and it.chat.model.name == "one-4bit")
        await it.idle()
        await it.ask("first")
        await it.ask("second")
        assert not rules(it) and not it.said
        await it.say(f"/load {two}")
        await it.until(lambda: it.said)
        assert it.said == [("info", "this conversation was last held with one-4bit; two-8bit answers now")]
        await it.idle()
        await it.ask("third")
        expected = [(3, "one-4bit → two-8bit")]
        assert rules(it) == expected
        assert places(it) == ["Question", "Answer", "Question", "Answer", "ModelChange", "Question", "Answer"]
        assert "── one-4bit → two-8bit ──" in "\n".join(
            it.screen.transcript.render_line(y).text for y in range(it.screen.transcript.size.height)
        )
        await it.say("/retry")
        await it.until(lambda: len(it.chat.state.branches) == 2)
        await it.idle()
        assert rules(it) == expected
        await it.say("/fork 2")
        await it.until(lambda: len(it.chat.state.turns) == 2)
        assert not rules(it)
        await it.say("/stats json")
        await it.until(lambda: '"model": "one-4bit"' in it.screen.transcript.blocks[-1].text)
        table = report_text(stats_report(it.chat))
        assert "one-4bit" in table
        await it.ask("other")
        assert rules(it) == expected


def test_a_question_stands_over_the_conversation_which_stays_in_sight(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("what was asked")
        for asked in (1, 2):
            await it.say("/retry")
            await it.until(lambda asked=asked: len(it.engine.asked("retry")) == asked)
            await it.idle()
        await it.say("/switch")
        await it.until(lambda: isinstance(it.app.screen, Choose))
        ground = it.app.screen.styles.background
        assert 0 < ground.a < 1
        await it.pilot.press("escape")


def test_letters_filter_a_choice_and_those_without_a_match_are_not_taken(tmp_path: Path):
    options = [("a", "Paris in spring"), ("b", "Lisbon"), ("c", "Paris in autumn")]

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        chosen: list[str | None] = []
        await it.app.push_screen(choose := Choose("Where?", options), chosen.append)
        await it.pilot.press(*"par")

        def rows() -> list[str]:
            return [str(option.prompt) for option in choose.query_one(Choices).options]

        await it.until(lambda: rows() == ["Paris in spring", "Paris in autumn"])
        await it.pilot.press("z", "backspace", "backspace", "backspace", *"autumn")
        await it.until(lambda: rows() == ["Paris in autumn"])
        await it.pilot.press("enter")
        await it.until(lambda: chosen == ["c"])
