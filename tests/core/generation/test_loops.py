"""Endless repetition is noticed soon, and text that merely has structure is left alone."""

import random
import time
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.generation.loops import MAX_SPAN, MIN_IDS, MIN_REPEATS, STRIDE, LoopDetector, LoopGuard


def first_alarm(ids: list[int]) -> int | None:
    detector = LoopDetector()
    return next((i for i, token in enumerate(ids) if detector.add(token)), None)


def plain_loop(ids: list[int]) -> bool:
    """The definition, span by span and id by id."""

    def repeats(span: int) -> bool:
        length = max(MIN_REPEATS * span, MIN_IDS)
        end = ids[-length:]
        return len(end) == length and all(end[i] == end[i + span] for i in range(length - span))

    return any(repeats(span) for span in range(1, MAX_SPAN + 1))


def words(text: str) -> list[int]:
    """A stand-in for a tokenizer with short tokens: characters, the hardest case for false alarms."""
    return [ord(c) for c in text]


@pytest.mark.parametrize("span", [1, 2, 3, 7, 20, 63, 64, 65, 100, 255, 256])
def test_a_repeated_span_is_noticed_within_one_stride_of_the_threshold(span: int):
    rng = random.Random(span)
    before = [rng.randrange(1000) for _ in range(300)]
    loop = [rng.randrange(248_320) for _ in range(span)]
    alarm = first_alarm(before + loop * (2000 // span))
    threshold = max(MIN_REPEATS * span, MIN_IDS)
    assert alarm is not None
    assert 0 <= alarm - (len(before) + threshold - 1) <= STRIDE + span


def test_a_span_longer_than_the_limit_is_not_a_loop():
    assert first_alarm(list(range(MAX_SPAN + 1)) * 20) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(0, 400),
    st.lists(st.integers(0, 2), max_size=30),
)
def test_the_verdict_at_each_stride_is_that_of_the_definition(
    span: list[int], length: int, before: list[int]
):
    ids = before + (span * (length // len(span) + 1))[:length]
    detector = LoopDetector()
    verdicts = [detector.add(token) for token in ids]
    last = len(ids) // STRIDE * STRIDE
    if last:
        assert verdicts[last - 1] == plain_loop(ids[:last])


def test_ids_beyond_unicode_and_surrogates_are_accepted():
    detector = LoopDetector()
    assert not any(detector.add(token) for token in range(0xD7F0, 0xE010))
    assert not any(detector.add(token) for token in range(4_000_000, 4_000_400))


COUNTING = "".join(f"{i}. item\n" for i in range(1, 400))
TABLE = "| name | value |\n|---|---|\n" + "".join(f"| row {i} | {i * i} |\n" for i in range(120))
RULED_TABLE = "|" + "---|" * 40 + "\n" + "| x " * 40 + "|\n"
SUDOKU = "board = [\n" + "    [0, 0, 0, 0, 0, 0, 0, 0, 0],\n" * 7 + "]\n"
CODE = "".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(60))
SHORT_RUN = "a" * (MIN_IDS - 1) + "!"
REFRAIN = "".join(f"Verse {i}.\nAnd so we sing, and so we sing, all day long.\n" for i in range(30))


@pytest.mark.parametrize("text", [COUNTING, TABLE, RULED_TABLE, SUDOKU, CODE, SHORT_RUN, REFRAIN])
def test_text_with_structure_is_no_loop(text: str):
    assert first_alarm(words(text)) is None


def test_random_ids_of_a_small_alphabet_are_no_loop():
    rng = random.Random(0)
    assert first_alarm([rng.randrange(2) for _ in range(20_000)]) is None


@pytest.mark.parametrize("ids", [words(COUNTING * 4), [7, 8] * 127 + [9], [5] * 255 + [9], [5] * 200 + [9]])
def test_an_id_costs_less_than_five_microseconds(ids: list[int]):
    detector = LoopDetector()
    many = (ids * (20_000 // len(ids) + 1))[:20_000]
    begin = time.process_time()
    for token in many:
        detector.add(token)
    seconds = time.process_time() - begin
    assert seconds / len(many) < 5e-6


# --- answers ---

HONEST = {
    "a line a hundred times": "The dog must not eat my homework.\n" * 100,
    "equal rows": "| item | count |\n|---|---|\n" + "| none | 0 |\n" * 300,
    "zeros": "0 " * 900,
    "a matrix of zeros": "[0, 0, 0, 0, 0, 0, 0, 0]\n" * 150,
    "a refrain": "La la la, la la la, all day long.\n\n" * 100,
}


@pytest.mark.parametrize("name", HONEST)
def test_an_answer_may_repeat_what_was_asked_for(name: str):
    guard = LoopGuard(enabled=True)
    assert not any(guard.loops(token, thinking=False) for token in words(HONEST[name]))


@pytest.mark.parametrize("span", [2, 9, 100, 256])
def test_an_answer_without_end_is_noticed_far_beyond_that(span: int):
    guard = LoopGuard(enabled=True)
    ids = list(range(span)) * (6000 // span)
    alarm = next(i for i, token in enumerate(ids) if guard.loops(token, thinking=False))
    assert 4000 < alarm < 5000


def test_a_thought_is_judged_more_strictly_than_an_answer_and_nothing_where_it_is_off():
    ids = [1, 2, 3] * 200
    guard = LoopGuard(enabled=True)
    assert any(guard.loops(token, thinking=True) for token in ids)
    assert not any(guard.loops(token, thinking=False) for token in ids)
    off = LoopGuard(enabled=False)
    assert not any(off.loops(token, thinking=thinking) for token in ids * 20 for thinking in (True, False))
    assert not off.begins_to_circle(CIRCLING)


# --- thoughts that circle ---

CIRCLING = "".join(
    f"Wait, I should {word} check {what} of the second term once more before I answer.\n"
    f"Actually, {what} of the second term {word} looks right to me, so the answer stands as it is.\n"
    for word, what in product(
        ("double", "also", "really", "just", "carefully", "quickly"), ("the sign", "the unit")
    )
    for _ in range(2)
)
CIRCLING_CHINESE = "".join(
    f"等一下，我{word}需要重新检查第二个式子的符号是否正确。"
    for word in ("还", "再", "也", "又", "仍", "真") * 8
)
NUMBERED = "".join(
    f"Case {i}: the number {i} is not divisible by 7, so it is not a candidate.\n" for i in range(200)
)
NAMES = [
    f"{a}{b}"
    for a in ("An", "Ben", "Cla", "Dor", "Em")
    for b in ("a", "ra", "ton", "rick", "ily", "us", "ia")
]
RIDDLE = "".join(
    f"If {a} sits beside {b}, then the third clue is broken, because {b} never sits near {a}.\n"
    for a, b in pairwise(NAMES)
)
VOCABULARY = [f"{name}{ending}" for name in NAMES for ending in ("", "s", "ed", "ing")]
POEM = [" ".join(random.Random(n).sample(VOCABULARY, 12)) + ".\n" for n in range(30)]
DRAFTS = "".join(f"Draft {n}.\n{''.join(POEM)}" for n in range(4))
LOGS = "".join(
    f"2024-05-01 12:00:{i:02} INFO worker {i} has finished its job and waits for the next one\n"
    for i in range(60)
)
COMMENTED = "".join(
    f"    # keep the value of row {i} and the next one for later use\n    x[{i}] = f(x[{i - 1}], {i})\n"
    for i in range(80)
)
LONG_ROWS = "".join(
    f"| {a} | plays the violin | lives in the old town | has {i} cats and a dog |\n"
    for i, a in enumerate(NAMES * 2)
)
HARMLESS = [COUNTING, TABLE, RULED_TABLE, SUDOKU, CODE, REFRAIN, *HONEST.values()]
HARMLESS += [NUMBERED, RIDDLE, DRAFTS, LOGS, COMMENTED, LONG_ROWS]


def circles_at(text: str, step: int = 7) -> int | None:
    guard = LoopGuard(enabled=True)
    return next((i for i in range(0, len(text), step) if guard.begins_to_circle(text[: i + step])), None)


@pytest.mark.parametrize("text", [CIRCLING * 2, CIRCLING_CHINESE])
@pytest.mark.parametrize("step", [1, 7, 500])
def test_a_thought_that_returns_to_the_same_sentences_circles(text: str, step: int):
    place = circles_at(text, step)
    assert place is not None and place < 0.8 * len(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_code_tables_lists_drafts_and_enumerations_do_not_circle(text: str):
    assert circles_at(text, 50) is None
