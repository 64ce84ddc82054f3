"""Probabilities of an answer's tokens: as text, as a table, and under a cursor in the app."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.core.events import Logprobs, TokenProbability
from qchat.tui.chat.probabilities import (
    SHOWN_ROWS,
    ScoredAnswer,
    Token,
    alternatives,
    probabilities_report,
    tokens_of,
    visible,
)
from qchat.tui.screens.probs import ProbsScreen
from qchat.tui.text.report import Table, report_text
from qchat.tui.text.sanitise import cells
from qchat.tui.widgets.token_text import BREAK, TokenText, rows_of
from tests.tui.chat_stage import ChatStage
from tests.tui.running_app import Running, chatting


def probability(text: str, share: float, id: int = 5) -> dict[str, Any]:
    return {"id": id, "data": list(text.encode()), "logprob": math.log(share)}


def event(text: str, share: float, *others: tuple[str, float], in_thought: bool = False) -> dict[str, Any]:
    top = [probability(other, one) for other, one in others]
    return {"event": "logprobs", "token": probability(text, share), "top": top, "in_thought": in_thought}


EVENTS = [
    {"event": "prefill", "done": 1, "total": 2, "cached": 1},
    event("hm", 0.5, in_thought=True),
    event("Paris", 0.95, ("Paris", 0.95), ("Lyon", 0.02)),
    event(" is", 0.6, (" is", 0.6), (",", 0.3)),
    event(" large", 0.25, (" big", 0.5), (" large", 0.25)),
    event(".\n", 0.05, ("!", 0.9)),
    event("Yes", 0.99, ("Yes", 0.99)),
]
SCORE = {"method": "score", "events": EVENTS}


def as_event(data: bytes, share: float = 0.5) -> Logprobs:
    return Logprobs(TokenProbability(1, tuple(data), math.log(share)), (), False)


def test_a_character_in_several_tokens_belongs_to_the_last_one():
    tokens = tokens_of([as_event(b"a"), as_event("é".encode()[:1]), as_event("é".encode()[1:] + b"b")])
    assert [token.text for token in tokens] == ["a", "", "éb"]


def test_what_a_terminal_would_obey_is_made_visible():
    (token,) = tokens_of([as_event(b"\x1b[31m")])
    assert "\x1b" not in token.text
    assert visible(" a\n\t") == "␣a↵⇥" and visible("") == "·"
    special = Logprobs(TokenProbability(7, (), -1.0), (TokenProbability(9, (), -2.0),), False)
    assert tokens_of([special])[0].others[0][0] == "token 9"


def test_perplexity_is_that_of_the_answer():
    tokens = [Token("a", 0.5, ()), Token("b", 0.125, ())]
    assert ScoredAnswer(1, tokens).perplexity == pytest.approx(4.0)
    assert ScoredAnswer(1, []).perplexity == 1.0
    assert ScoredAnswer(1, [Token("a", 0.0, ())]).perplexity > 1e100


def test_a_token_that_is_none_of_the_likeliest_is_among_its_alternatives():
    bars = alternatives(Token("x", 0.01, (("y", 0.6), ("z", 0.3))))
    assert bars.top == 1.0, "a bar is a share of all there is"
    assert [(bar.label, bar.text, bar.style) for bar in bars.rows] == [
        ("  y", "60.0%", "bar"),
        ("  z", "30.0%", "bar"),
        ("› x", "1.0%", "accent"),
    ]


def test_in_lines_there_is_a_table_of_the_answers_tokens(tmp_path: Path):
    stage = ChatStage(tmp_path, SCORE)
    front = stage.play("What is the capital of France?", "/probs")
    assert stage.fake.asked("score") == [{"turn": 1, "count": 8}]
    said = report_text(front.all("report")[0])
    assert said.startswith("Answer 1 · 5 tokens · perplexity")
    assert "place 2, token ␣is, probability 60.0%, instead , 30.0%" in said
    assert "hm" not in said
    assert not [kind for kind, _ in front.calls if kind in ("rebuilt", "finished")][1:]


def test_of_a_long_answer_the_least_likely_tokens_are_shown_in_their_order():
    tokens = [Token(str(n), 0.1 if n % 3 else 0.9, ()) for n in range(90)]
    report = probabilities_report(ScoredAnswer(2, tokens))
    table = report.parts[0]
    assert isinstance(table, Table)
    places = [int(row[0]) for row in table.rows]
    assert len(places) == SHOWN_ROWS and places == sorted(places)
    assert not any((place - 1) % 3 == 0 for place in places)
    assert "50 tokens that were likelier" in report_text(report)


@pytest.mark.parametrize(
    ("line", "sentence"), [("/probs", "there is no question yet"), ("/probs 3", "there is no question yet")]
)
def test_without_an_answer_nothing_is_scored(tmp_path: Path, line: str, sentence: str):
    stage = ChatStage(tmp_path)
    assert sentence in stage.play(line).said and not stage.fake.asked("score")


def test_an_unknown_answer_and_a_failing_engine_are_sentences(tmp_path: Path):
    failing = {"method": "score", "error": {"kind": "UsageError", "message": "no room"}}
    front = ChatStage(tmp_path, failing).play("hello", "/probs 2", "/probs")
    assert [said for kind, said in front.notes if kind == "error"] == [
        "there is no question 2: this conversation has 1",
        "no room",
    ]


@given(st.lists(st.text(alphabet="ab 中\n\t👩", max_size=12), max_size=30), st.integers(2, 40))
def test_rows_hold_every_token_in_order_and_none_is_too_wide(texts: list[str], width: int):
    rows = rows_of(texts, width)
    assert all(sum(cells(text) for _, text in row) <= width for row in rows)
    numbers = [number for row in rows for number, _ in row]
    assert numbers == sorted(numbers)
    assert set(numbers) == {number for number, text in enumerate(texts) if text}
    assert sum(text == BREAK for row in rows for _, text in row) == "".join(texts).count("\n")


async def opened(it: Running) -> ProbsScreen:
    await it.ask("What is the capital of France?")
    await it.say("/probs")
    await it.until(lambda: isinstance(it.app.screen, ProbsScreen))
    screen = it.app.screen
    assert isinstance(screen, ProbsScreen)
    await it.until(lambda: "Paris" in here(screen))
    return screen


def here(screen: ProbsScreen) -> str:
    return str(screen.query_one("#probs-here").content)  # pyright: ignore


@pytest.mark.slow
def test_in_the_app_the_cursor_tells_what_else_could_have_come(tmp_path: Path):
    @chatting(tmp_path, SCORE)
    async def check(it: Running) -> None:
        screen = await opened(it)
        text = screen.query_one(TokenText)
        strip = text.render_line(0)
        assert strip.text.rstrip() == "Paris is large.↵"
        styles = {segment.text: segment.style for segment in strip if segment.style}
        assert styles["Paris"].reverse, "the cursor is on the first token"
        assert styles["."].underline and styles[" is"].color != styles[" large"].color
        assert "Lyon" in here(screen) and "95.0%" in here(screen)
        await it.pilot.press("right")
        await it.until(lambda: "30.0%" in here(screen))
        await it.pilot.press("n")
        await it.until(lambda: "› ␣large" in here(screen) and "␣big" in here(screen))
        await it.pilot.press("end")
        await it.until(lambda: "Yes" in here(screen))
        await it.pilot.press("up")
        await it.until(lambda: "Paris" in here(screen))
        await it.pilot.press("n", "n")
        await it.until(lambda: ".↵" in here(screen))
        await it.pilot.press("escape")
        await it.until(lambda: it.app.screen is it.screen)
        assert len(it.chat.state.turns) == 1 and it.phase == "idle"


@pytest.mark.slow
@pytest.mark.parametrize("size", [(60, 16), (200, 60), (40, 10)])
def test_the_screen_fits_windows_of_all_sizes_and_a_click_chooses(tmp_path: Path, size: tuple[int, int]):
    @chatting(tmp_path, SCORE, size=size)
    async def check(it: Running) -> None:
        screen = await opened(it)
        text = screen.query_one(TokenText)
        assert text.size.height >= 1 and screen.query_one("#sheet-keys").region.bottom <= size[1]
        await it.pilot.click(TokenText, offset=(8, 0))
        await it.until(lambda: "› ␣is" in here(screen))
