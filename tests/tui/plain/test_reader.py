"""The line-based chat with a scripted engine: what it writes, asks and does; rows that come once and stay."""

import asyncio
import contextlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qchat.core import Store
from qchat.core.errors import QchatError
from qchat.core.events import Text
from qchat.tui.chat.controller import Chat
from qchat.tui.chat.decoding import Batch
from qchat.tui.chat.start import Beginning
from qchat.tui.chat.turns import NO_STATE, new_turn
from qchat.tui.plain.printer import Flow, Printer
from qchat.tui.plain.reader import Interrupted, message
from qchat.tui.plain.repl import Repl
from qchat.tui.text.markdown.lines import Frame, plain
from qchat.tui.text.markdown.stream import document
from qchat.tui.text.report import Bar, Bars, Report
from qchat.tui.user.history import History
from qchat.tui.user.settings import Settings
from tests.run_async import run_async
from tests.tui.fake_engine import FakeEngine
from tests.tui.fake_terminal import FakeTerminal
from tests.tui.task_results import results

BLOCKS = st.sampled_from(
    (
        "# A heading",
        "Plain words, many of them, so that they go over more than one line of the screen.",
        "- one item that is long enough to be broken\n- another",
        "1. first\n2. second **bold** `code`\n3. third",
        "```python\nfor x in range(3):\n    print(x)\n\nprint('end')\n```",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "> quoted words that go on and on until they have to be broken somewhere",
        "Words with *stress* and [a](b).",
        "---",
        "Title\n===",
        "漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字",
        "a  \nb",
        "```\nopen fence\nwithout end",
        "- item\n\n  with a second paragraph, long enough to be broken\n\n- next",
        "x " * 60,
        "    indented code",
    )
)
LONG = {"method": "send", "answer": "word " * 300, "seconds": 0.01}


class TypedLines:
    """Somebody who types these lines one after the other; an exception among them is raised."""

    edits = True

    def __init__(self, *lines: str | BaseException, answers: tuple[str, ...] = ()):
        self._lines, self._answers = list(lines), list(answers)
        self.drafts: list[str] = []

    async def line(self, prompt: str, draft: str = "") -> str:
        del prompt
        self.drafts.append(draft)
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    async def answer(self, prompt: str) -> str:
        del prompt
        if not self._answers:
            raise Interrupted
        return self._answers.pop(0)


class ReplScene:
    """The line-based chat, attended or not, with typed lines and a scripted engine."""

    def __init__(
        self,
        folder: Path,
        *steps: dict[str, Any],
        attended: bool = True,
        store: Store | None = None,
        **options: Any,
    ):
        self.fake = FakeEngine(folder, *steps)
        chosen = Settings().replaced("test", models_dir=[str(folder)], **options)
        self.repl = Repl(
            lambda view: Chat(view, self.fake.client, settings=chosen, store=store), chosen, History()
        )
        self.repl.attended = attended
        self.repl._terminal = None
        self.beginning = Beginning("/models/fake-4bit")

    def play(self, *lines: str | BaseException, answers: tuple[str, ...] = ()) -> TypedLines:
        typed = TypedLines(*lines, answers=answers)
        self.repl.reader = typed
        assert run_async(self.repl.run(self.beginning)) == 0
        return typed


# --- rows ---


@pytest.mark.slow
@settings(max_examples=150)
@given(st.lists(BLOCKS, min_size=1, max_size=5), st.randoms(use_true_random=False), st.integers(20, 60))
def test_rows_that_come_early_are_those_of_the_whole_text(blocks, random, width):
    source = "\n\n".join(blocks)
    frame, flow = Frame(width, width), Flow(Frame(width, width))
    rows, at = [], 0
    while at < len(source):
        step = random.randint(1, 12)
        rows += flow.feed(source[at : at + step])
        at += step
    rows += flow.finish()
    # a fence's colours may differ, for it is coloured as a whole afterwards; its words may not
    assert [plain(row).rstrip() for row in rows] == [plain(row).rstrip() for row in document(source, frame)]


def test_plain_words_come_before_their_paragraph_ends():
    flow = Flow(Frame(20, 20))
    assert flow.feed("one two three four five six seven eight nine ten eleven twelve")
    assert not Flow(Frame(20, 20)).feed("one *two three four five six seven eight nine ten eleven twelve")


def on_screen(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    """From here on; the test runner sets its own streams before every test's body."""
    screen = FakeTerminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_what_the_model_writes_never_reaches_the_terminal_raw(monkeypatch):
    screen = on_screen(monkeypatch)
    printer = Printer()
    printer.begin_answer()
    for piece in ("a\x1b", "[31mred\x07 \u202e", "b\n\n```\n\x1b]0;title\x07\n```"):
        printer.answer(piece)
    printer.end_answer()
    printer.note("evil \x1b[2J", "error")
    printer.line("t\x1b[1mx")
    left = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert "\x1b" not in left and "\x07" not in left and "\u202e" not in left
    assert "\x1b[31mred" not in screen.getvalue()


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_is_left_out_where_it_is_not_wanted(monkeypatch, name, value):
    screen = on_screen(monkeypatch)
    monkeypatch.setenv(name, value)
    printer = Printer()
    printer.begin_answer()
    printer.answer("# Head\n\n**bold** `code`\n")
    printer.end_answer()
    printer.report(Report("T", (Bars([Bar("a", 1)]),)))
    printer.note("x", "warning")
    assert "\x1b" not in screen.getvalue()
    assert "Head" in screen.getvalue() and "warning: x" in screen.getvalue()


def test_read_aloud_there_are_words_and_no_pictures(monkeypatch):
    screen = on_screen(monkeypatch)
    printer = Printer(spoken=True)
    printer.begin_answer()
    printer.answer("- **bold**\n")
    printer.end_answer()
    printer.report(Report("T", (Bars([Bar("a", 1, "one")]),)))
    assert screen.getvalue() == "- **bold**\nT\na: one\n"


def test_a_terminal_without_unicode_gets_none_of_ours(monkeypatch):
    screen = on_screen(monkeypatch)
    monkeypatch.setattr(FakeTerminal, "encoding", "ascii")
    printer = Printer()
    printer.report(Report("a · b", (Bars([Bar("a", 1)]),)))
    printer.begin_answer()
    printer.answer("# words")
    printer.end_answer()
    assert screen.getvalue().isascii() and "#" * 30 in screen.getvalue()


def test_slow_work_tells_each_tenth_once_on_one_line(monkeypatch):
    screen = on_screen(monkeypatch)
    now = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    printer = Printer(spoken=True)
    for done in (0, 10, 11, 12, 20, 55, 100):
        printer.progress("loading", done / 100)
    printer.line("ready")
    assert screen.getvalue() == "loading: 10% 20% 50% 100%\nready\n"


# --- the chat ---


def test_thought_answer_and_figures_are_written_once(tmp_path, capsys):
    scene = ReplScene(tmp_path, {"method": "send", "thought": "hm hm", "answer": "Paris is it."})
    scene.play("/set verbose", "Where?")
    out, err = capsys.readouterr()
    assert out.count("Paris is it.") == 1
    assert re.search(r"thought \d+\.\d s · 2 tokens", out) and "hm hm" not in out
    assert "25.0/s" in err and "each reply ends with its figures" in err


def test_a_thought_is_shown_to_who_wants_it(tmp_path, capsys):
    reply = {"method": "send", "thought": "hm hm", "answer": "Yes."}
    ReplScene(tmp_path, reply, show_thinking=True).play("Why?")
    out = capsys.readouterr().out
    assert out.index("hm hm") < out.index("thought ") < out.index("Yes.")


def test_a_screen_reader_hears_who_speaks(tmp_path, capsys):
    reply = {"method": "send", "thought": "hm", "answer": "Yes."}
    ReplScene(tmp_path, reply, screen_reader=True).play("Why?")
    out = capsys.readouterr().out
    assert re.search(r"Thought \(\d+\.\d s\)\.\nQwen: Yes\.", out)


def test_pictures_are_told_of_in_a_sentence_each(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (1280, 800)).save(name)
    ReplScene(tmp_path, {"method": "send", "answer": "Yes."}, screen_reader=True).play("@a.png @b.png Why?")
    err = capsys.readouterr().err
    assert "picture a.png, 1,280 by 800 pixels\npicture b.png, 1,280 by 800 pixels\n" in err


def test_undo_gives_the_question_back_to_the_prompt(tmp_path):
    typed = ReplScene(tmp_path).play("Where?", "/undo")
    assert typed.drafts == ["", "", "Where?"]


def test_a_refused_question_returns_to_the_prompt(tmp_path, capsys):
    error = {"kind": "ContextLengthExceeded", "message": "the prompt has 9 tokens", "exit_code": 4}
    typed = ReplScene(tmp_path, {"method": "send", "error": error}).play("Too long?")
    assert typed.drafts[-1] == "Too long?"
    assert "the prompt has 9 tokens" in capsys.readouterr().err


def test_files_go_with_the_message_that_names_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("remember")
    scene = ReplScene(tmp_path)
    scene.play("read @note.txt please", "/read absent.txt", "see @note.txt")
    assert [text.count("remember") for text in (one["text"] for one in scene.fake.asked("send"))] == [1, 1]
    assert "there is no such file" in capsys.readouterr().err


def test_ctrl_c_at_an_empty_prompt_leaves_when_pressed_twice(tmp_path, capsys):
    typed = ReplScene(tmp_path).play(Interrupted(), Interrupted(), "never read")
    assert len(typed.drafts) == 2
    assert "ctrl+c again leaves" in capsys.readouterr().err


def test_ctrl_c_stops_a_reply_and_the_chat_goes_on(tmp_path, capsys):
    scene = ReplScene(tmp_path, LONG, {"method": "send", "answer": "Second."})
    begin = scene.repl.events

    def interrupt_once(batch: Batch) -> None:
        begin(batch)
        if any(isinstance(event, Text) for event in batch):
            scene.repl.events = begin
            scene.repl.interrupt()

    scene.repl.events = interrupt_once
    scene.play("first", "second")
    out, err = capsys.readouterr()
    assert "Second." in out and "stopped" in err
    assert len(scene.fake.asked("cancel")) == 1


def test_three_ctrl_c_in_a_row_end_everything(tmp_path):
    scene = ReplScene(tmp_path, LONG)
    scene.repl.reader = TypedLines("first")

    async def run() -> int:
        running = asyncio.create_task(scene.repl.run(scene.beginning))
        while not scene.fake.asked("send"):
            await asyncio.sleep(0.02)
        for _ in range(3):
            scene.repl.interrupt()
        return await running

    assert run_async(run()) == 130


def test_a_dead_engine_is_told_of_once_and_enter_restarts_it(tmp_path, capsys):
    scene = ReplScene(tmp_path, {"method": "send", "answer": "Half", "die": "SIGKILL"})
    scene.play("Why?", "", "/stats")
    out, err = capsys.readouterr()
    assert err.count("SIGKILL") == 1 and "Half" in out
    assert len(scene.fake.asked("load")) == 2


def test_a_model_that_cannot_be_loaded_ends_an_unattended_chat(tmp_path, capsys):
    error = {"kind": "WeightsError", "message": "a shard is cut", "exit_code": 3}
    step = {"method": "load", "error": error}
    with pytest.raises(QchatError, match="a shard is cut"):
        ReplScene(tmp_path, step, attended=False).play("hello")
    ReplScene(tmp_path, step).play("hello")
    assert capsys.readouterr().err.count("no model is loaded") == 1


def test_jobs_are_waited_for_and_end_in_a_report(tmp_path, capsys):
    progress = {"event": "progress", "done": 1, "total": 2, "unit": "bytes"}
    result = results()["inspect"] | {"repairs": ["norms +1"]}
    step = {"method": "inspect", "events": [progress], "result": result}
    ReplScene(tmp_path, step).play("/inspect", "/about")
    out, err = capsys.readouterr()
    assert out.index("inspect fake-4bit: done") < out.index("norms +1") < out.index("Python")
    assert "ctrl+c stops it" in err


def test_questions_of_commands_are_answered_or_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Store(tmp_path / "store.db") as store:
        store.add_node(store.create(), None, "user", text="Hello?")
        scene = ReplScene(tmp_path, store=store)
        lines = ("hi", *["/export a.md"] * 3, *["/fork"] * 3)
        scene.play(*lines, answers=("y", "no", "9", "1", ""))
    out, err = capsys.readouterr()
    assert err.count("written to") == 2 and err.count("nothing was written") == 1
    assert "'9' is not among them, wanted 1 to 1" in err and "on a branch after question 1" in err
    assert "1  1  hi" in out


def test_nobody_is_asked_where_nobody_is(tmp_path, capsys):
    ReplScene(tmp_path, attended=False).play("hi", "/fork", "/edit")
    err = capsys.readouterr().err
    assert "nobody is here to be asked" in err and "no terminal for an editor" in err


def test_find_shows_the_lines_themselves(tmp_path, capsys):
    scene = ReplScene(tmp_path, {"method": "send", "answer": "It is Paris."})
    scene.play("Where?", "/find paris", "/find Rome")
    out, err = capsys.readouterr()
    assert "turn 1, answer, line It is Paris." in out
    assert "1 match for " in err and "no matches for 'Rome'" in err


def test_what_only_a_full_screen_has_says_so(tmp_path, capsys):
    ReplScene(tmp_path).play("/theme auto", "/mouse off", "/plain", "/keys", "/theme")
    out, err = capsys.readouterr()
    assert "full screen" in err and "terminal's" in err and "already" in err
    assert "ctrl+r" in out and "auto" in out


def test_an_earlier_conversation_is_introduced_by_its_end(tmp_path, capsys):
    scene = ReplScene(tmp_path)
    turn = replace(new_turn(1, "Where?"), answer="In Paris.")
    state = replace(NO_STATE, conversation=7, title="Cities", turns=(turn, turn))
    scene.repl.rebuilt(state)
    scene.repl.rebuilt(replace(state, turns=(turn,)))
    out = capsys.readouterr().out
    assert out.count("Cities · 2 turns") == 1 and out.count("In Paris.") == 1


def test_the_toolbar_has_speed_context_and_memory(tmp_path):
    scene = ReplScene(tmp_path)
    scene.play("hello")
    assert re.fullmatch(r"25\.0 tok/s · ctx \d+% · 5\.4 GB · /help", scene.repl._toolbar())


@pytest.mark.parametrize(
    ("spoken", "prompt"), [(True, "You (schema city.json): "), (False, "schema city.json > ")]
)
def test_the_prompt_or_the_toolbar_names_the_schema(tmp_path: Path, spoken: bool, prompt: str):
    (tmp_path / "city.json").write_text("{}")
    scene = ReplScene(tmp_path, screen_reader=spoken)
    scene.play("hello", f"/schema {tmp_path}/city.json")
    assert scene.repl._prompt.replace("❯", ">") == prompt
    assert scene.repl._toolbar().endswith(" · schema city.json · /help")
    scene.repl._has_toolbar = not spoken
    assert scene.repl._prompt.replace("❯", ">") == (prompt if spoken else "> ")


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (("hello",), "hello"),
        (('"""one', 'two"""'), "one\ntwo"),
        (('"""', "", "one", '"""'), "one"),
        (('"""one"""',), "one"),
        (('"""/not a command', '"""'), "/not a command"),
    ],
)
def test_quotes_hold_lines_together(lines, text):
    assert run_async(message(TypedLines(*lines), "")) == text


def test_quotes_that_are_never_closed_end_with_the_input():
    with contextlib.suppress(EOFError):
        run_async(message(TypedLines('"""one'), ""))
        pytest.fail("the end of the input was not told")


DOCSTRING = 'def f():\n    """Doc."""\n    return 1'
LONG_DOCSTRING = 'def f():\n    """Doc\n\n    more\n    """\n    return r"""x\ny"""'
MODULE = '"""Module\n\nmore\n"""\nimport x\n\nTEXT = """\nlines\n"""'


@pytest.mark.parametrize("code", [DOCSTRING, LONG_DOCSTRING, MODULE, 'say """ for a block', "a\n\nb"])
def test_a_block_may_hold_docstrings(code: str):
    for lines in (['"""', *code.split("\n"), '"""'], [f'"""\n{code}\n"""'], ['"""', code, '"""']):
        assert run_async(message(TypedLines(*lines), "")) == code


def test_words_after_the_opening_quotes_may_be_followed_by_docstrings():
    for code in (DOCSTRING, LONG_DOCSTRING):
        lines = ['"""Explain:', *code.split("\n"), '"""']
        assert run_async(message(TypedLines(*lines), "")) == f"Explain:\n{code}"


def test_a_block_that_is_open_at_the_end_of_the_input_is_said(tmp_path, capsys):
    scene = ReplScene(tmp_path, {"method": "send", "answer": "Paris."}, attended=False)
    scene.play('"""The capital', "of France?")
    assert "Paris." in capsys.readouterr().out
    assert [params["text"] for params in scene.fake.asked("send")] == ["The capital\nof France?"]
