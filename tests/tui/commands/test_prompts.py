"""Prompt templates: what fills them in, where they come from, and what is said of bad ones."""

import shutil
from pathlib import Path

import pytest

from qchat.core.errors import UsageError
from qchat.tui.commands import completions
from qchat.tui.text.report import report_text
from qchat.tui.user.prompts import fill, places, prompts_dir
from tests.tui.chat_stage import ChatStage
from tests.tui.running_app import Running, chatting


@pytest.fixture(autouse=True)
def folder() -> Path:
    """A folder with templates of both kinds, and files that are none."""
    folder = prompts_dir()
    folder.mkdir(parents=True)
    (folder / "review.md").write_text("Review $1 for $2.\n")
    (folder / "explain.txt").write_text("Explain this:\n$ARGUMENTS\nIt costs $$5.\n")
    (folder / "plain.md").write_text("Be brief.\n")
    (folder / "bad.md").write_bytes(b"\xff\xfe\x00")
    (folder / "no name.md").write_text("x")
    (folder / "other.toml").write_text("x")
    return folder


@pytest.mark.parametrize(
    ("template", "arguments", "words", "filled"),
    [
        ("a $1 b $2 c $1", "x y", ["x", "y"], "a x b y c x"),
        ("$1", "$2 $ARGUMENTS", ["$2 $ARGUMENTS"], "$2 $ARGUMENTS"),
        ("all: $ARGUMENTS", "it's open", [], "all: it's open"),
        ("$$1 and $12", "a", ["a"], "$1 and a2"),
        ("nothing", "more words", [], "nothing\n\nmore words"),
        ("nothing", "", [], "nothing"),
        ("$ARGUMENTSX $x $0", "", [], "$ARGUMENTSX $x $0"),
    ],
)
def test_places_take_words_and_words_are_never_places(template, arguments, words, filled):
    assert fill(template, arguments, words) == filled


def test_missing_words_are_counted():
    assert places("$2 $ARGUMENTS $1 $$9") == ["$1", "$2", "$ARGUMENTS"]
    with pytest.raises(UsageError, match="wants 2 words, and 1 were given"):
        fill("$2", "x", ["x"])


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ('/prompts review "main.py and more" bugs', "Review main.py and more for bugs."),
        ("/prompts explain why it's so", "Explain this:\nwhy it's so\nIt costs $5."),
        ("/prompts plain", "Be brief."),
        ("/prompts plain What is it?", "Be brief.\n\nWhat is it?"),
    ],
)
def test_a_filled_template_stands_in_the_prompt(tmp_path: Path, line: str, prompt: str):
    assert ChatStage(tmp_path).play(line).all("put_prompt") == [prompt]


def test_where_no_prompt_can_be_edited_it_is_sent(tmp_path: Path):
    stage = ChatStage(tmp_path)
    stage.front.can_edit = False
    stage.play("/prompts plain What?")
    assert [asked["text"] for asked in stage.fake.asked("send")] == ["Be brief.\n\nWhat?"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/prompts reviw x", "there is no prompt 'reviw'; did you mean review?"),
        ("/prompts ../config", "there is no prompt"),
        ("/prompts review x", "the prompt wants 2 words, and 1 were given"),
        ("/prompts review 'x", "cannot be told apart"),
        ("/prompts bad", "not UTF-8"),
        ("/prompts edit ../x", "cannot be the name of a prompt"),
    ],
)
def test_what_cannot_be_filled_in_is_said_in_a_sentence(tmp_path: Path, line: str, sentence: str):
    front = ChatStage(tmp_path).play(line)
    ((kind, said),) = front.notes
    assert kind == "error" and sentence in said and "\n" not in said


def test_templates_are_listed_completed_and_written_in_the_editor(tmp_path: Path, folder: Path):
    stage = ChatStage(tmp_path)
    stage.front.answers = ["Do $1.\n", None]
    front = stage.play("/prompts", "/prompts edit todo", "/prompts edit review", "/prompts todo it")
    listed = report_text(front.all("report")[0])
    assert "review" in listed and "$1 $2" in listed and "no name" not in listed and "UTF-8" in listed
    assert (folder / "todo.md").read_text() == "Do $1.\n"
    assert front.all("edit_text")[1] == "Review $1 for $2."
    assert ("info", "nothing was changed") in front.notes
    assert front.all("put_prompt") == ["Do it."]
    assert [one.line for one in completions("/prompts re", stage.chat)] == ["/prompts review"]
    assert [one.line for one in completions("/prompts edit t", stage.chat)] == ["/prompts edit todo"]


def test_without_templates_the_list_says_how_to_write_one(tmp_path: Path, folder: Path):
    shutil.rmtree(folder)
    said = ChatStage(tmp_path).play("/prompts").said
    assert "there is none yet" in said and "/prompts edit NAME" in said and str(prompts_dir()) in said


def test_in_the_app_a_template_of_several_lines_waits_in_the_prompt(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.say("/prompts explain that")
        await it.until(lambda: it.prompt.text == "Explain this:\nthat\nIt costs $5.")
        assert it.prompt.has_focus and not it.engine.asked("send")
