"""Two answers to one question, word by word: side by side, one below the other, and in sentences."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.core import Store
from qchat.tui.text.diff import BESIDE_COLUMNS, Diff, diff_lines, diff_words, pairs
from qchat.tui.text.report import report_lines, report_text
from qchat.tui.widgets.transcript.messages import MenuRequested
from tests.tui.chat_stage import ChatStage
from tests.tui.running_app import Running, chatting

OLD = "The cat sat.\nIt was red.\n\nThe end."
NEW = "The cat slept.\nIt was red.\n\nMore.\nThe end."
ANSWERS = ({"method": "send", "answer": "Paris is big."}, {"method": "retry", "answer": "Paris is large."})
TEXTS = st.lists(st.sampled_from(["a cat", "a dog", "", "中文 text", "one  two", "x" * 90]), max_size=6).map(
    "\n".join
)


def drawn(width: int, old: str = OLD, new: str = NEW) -> list[str]:
    lines = diff_lines(Diff(old, new, "one", "two"), width)
    return ["".join(text for _, text in line).rstrip() for line in lines]


def coloured(style: str, width: int = 100) -> str:
    lines = diff_lines(Diff(OLD, NEW, "one", "two"), width)
    return " ".join(text for line in lines for name, text in line if name == style and text.strip(" -+"))


def test_wide_windows_show_both_side_by_side_with_the_words_that_differ_in_colour():
    rows = drawn(100)
    assert rows[0].split() == ["one", "│", "two"]
    assert rows[1].startswith("- The cat sat.") and rows[1].endswith("+ The cat slept.")
    assert rows[2].startswith("  It was red.") and rows[2].endswith("  It was red.")
    assert coloured("bad") == "sat" and coloured("good") == "slept More."
    assert len({row.find("│") for row in rows}) == 1


def test_narrow_windows_show_one_below_the_other():
    assert drawn(60) == [
        "- one", "+ two", "- The cat sat.", "+ The cat slept.", "  It was red.", "", "+ More.", "  The end.",
    ]  # fmt: skip


def test_equal_answers_are_said_to_be_equal():
    assert drawn(100, OLD, OLD + "\n") == ["both say the same"]
    assert diff_words(Diff(OLD, OLD, "one", "two")) == ["both say the same"]


def test_aloud_only_the_differences_are_told():
    said = diff_words(Diff(OLD, NEW, "one", "two"))
    assert said == ["line 1, one: The cat sat.; two: The cat slept.", "line 4, two: More."]


@given(TEXTS, TEXTS)
def test_both_texts_can_be_read_from_the_pairs(old: str, new: str):
    found = list(pairs(old, new))
    lefts = ["".join(text for _, text in one.left) for one in found if one.left is not None]
    rights = ["".join(text for _, text in one.right) for one in found if one.right is not None]
    assert "\n".join(lefts) == old and "\n".join(rights) == new


def test_long_texts_without_a_common_word_are_compared_in_time():
    old = "\n".join(f"a{n} " * 30 for n in range(1_500))
    assert drawn(100, old, old.replace("a", "b"))


def test_the_last_answer_is_compared_with_the_one_before_it(tmp_path: Path):
    stage = ChatStage(tmp_path, *ANSWERS)
    front = stage.play("What is Paris?", "/retry", "/diff")
    report = front.all("report")[-1]
    said = report_text(report)
    assert "Question 1 · What is Paris?" in said
    assert "answer 1/2 · fake-4bit: Paris is big.; answer 2/2 · fake-4bit: Paris is large." in said
    assert any(
        "big" in text for line in report_lines(report, BESIDE_COLUMNS) for name, text in line if name == "bad"
    )
    assert stage.fake.asked("replies") and not front.all("error")


def test_another_one_is_chosen_by_its_place_and_edited_questions_are_compared_too(tmp_path: Path):
    stage = ChatStage(
        tmp_path, *ANSWERS, {"method": "edit", "answer": "Lyon is big."}, store=Store(tmp_path / "c.db")
    )
    front = stage.play("What is Paris?", "/retry", "/edit 1 What is Lyon?", "/diff 1 1")
    said = report_text(front.all("report")[-1])
    assert "answer 1/3 · fake-4bit: What is Paris?; answer 3/3 · fake-4bit: What is Lyon?" in said
    assert "Paris is big.; answer 3/3 · fake-4bit: Lyon is big." in said


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (("/diff",), "there is no question yet"),
        (("hello", "/diff"), "question 1 has one answer: /retry gives another one"),
        (("hello", "/diff 2"), "there is no question 2: this conversation has 1"),
        (("hello", "/retry", "/diff 1 2"), "answer 2 is the one shown"),
        (("hello", "/retry", "/diff 1 9"), "the other answer is 9"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(tmp_path: Path, lines: tuple[str, ...], sentence: str):
    front = ChatStage(tmp_path).play(*lines)
    assert front.notes[-1][0] == "error" and sentence in front.notes[-1][1]


def test_in_the_app_the_difference_stands_in_the_conversation(tmp_path: Path):
    @chatting(tmp_path, *ANSWERS)
    async def check(it: Running) -> None:
        await it.ask("What is Paris?")
        await it.say("/retry")
        await it.until(lambda: len(it.chat.state.branches) == 2)
        await it.idle()
        await it.say("/diff")
        await it.until(lambda: "large" in it.screen.transcript.blocks[-1].text)
        assert "answer 2/2" in it.screen.transcript.blocks[-1].text


def test_the_menu_of_a_question_with_several_answers_compares_them(tmp_path: Path):
    @chatting(tmp_path, *ANSWERS)
    async def check(it: Running) -> None:
        offered: list[list[str]] = []

        async def choose(title: str, options: list[tuple[str, str]]) -> str | None:
            assert title == "Question 1"
            offered.append([value for value, _ in options])
            return "diff" if "diff" in offered[-1] else None

        it.front.choose = choose
        await it.ask("What is Paris?")
        it.screen.post_message(MenuRequested(1))
        await it.until(lambda: len(offered) == 1)
        assert "diff" not in offered[0]
        await it.say("/retry")
        await it.until(lambda: len(it.chat.state.branches) == 2)
        await it.idle()
        it.screen.post_message(MenuRequested(1))
        await it.until(lambda: "answer 2/2" in it.screen.transcript.blocks[-1].text)
