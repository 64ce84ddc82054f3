"""Endless repetition is noticed soon, and text that merely has structure is left alone."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.generation.loops import MAX_SPAN, MIN_IDS, MIN_REPEATS, STRIDE, LoopDetector


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
