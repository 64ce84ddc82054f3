"""What may be shown, how wide it is, where it breaks."""

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from qchat.tui.text.sanitise import Cleaner, breaks, cells, chop, cut, fit, printable, wrap

NASTY = "\x00\x07\x1b[]m;031\r\n\t\x7f\x9b\u202e\u2066\u200d\u200b\xad\u2028\ufffe\ufe0f"
LETTERS = "ab  漢字、「」각é\u0301👩👧🏽❤️☎עברي"
texts = st.text(st.sampled_from(NASTY + LETTERS) | st.characters(), max_size=60)
lines = st.text(
    st.sampled_from(LETTERS) | st.characters(categories=("L", "M", "N", "P", "S", "Zs")), max_size=80
)


@given(texts)
def test_nothing_that_commands_a_terminal_stays(text: str):
    shown = printable(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    shown.encode()
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x1b[0m b", "ared b"),
        ("a\x1b]0;title\x07b", "a]0;titleb"),
        ("user\u202etxt.exe", "usertxt.exe"),
        ("a\udcffb", "a\ufffdb"),
        ("one\u2028two", "one\ntwo"),
        ("क\u094d\u200dष", "क\u094dष"),
    ],
)
def test_sequences_go_whole_and_the_rest_stays(text: str, shown: str):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text", ["naïve 日本語 العربية", "👩‍👩‍👧 👍🏽 ❤️ 🏳️‍🌈", "e\u0301\n\tcode", "می\u200cخواهم"]
)
def test_letters_marks_and_emoji_stay(text: str):
    assert printable(text) == text


@given(texts, st.lists(st.integers(0, 60)))
@example("\x1b[31mred👩\u200d👧", [1, 3, 8, 9])
def test_pieces_are_cleaned_as_the_whole_is(text: str, cuts: list[int]):
    cleaner, places = Cleaner(), sorted({0, len(text), *(min(at, len(text)) for at in cuts)})
    pieces = [cleaner.feed(text[a:b]) for a, b in pairwise(places)]
    assert "".join([*pieces, cleaner.flush()]) == printable(text)


@given(lines)
def test_widths_are_the_ones_that_the_screen_counts_with(text: str):
    assert cells(text) == cell_len(text)


@given(lines, st.integers(0, 20))
def test_what_is_cut_fits(text: str, width: int):
    assert cells(cut(text, width)) <= width
    assert {cells(fit(text, width, side)) for side in ("left", "right", "center")} == {width}
    assert cut(text, width) == text or cut(text, width).endswith("…"[:width])


@given(lines, st.integers(2, 30))
def test_lines_are_broken_within_the_width_and_lose_only_spaces(text: str, width: int):
    ranges = breaks(text, width)
    at = 0
    for start, end in ranges:
        assert not text[at:start].strip(" \t")
        assert cells(text[start:end]) <= width
        at = end
    assert not text[at:].strip(" \t")


@given(lines, st.integers(2, 30))
def test_hard_cuts_lose_nothing(text: str, width: int):
    ranges = chop(text, width)
    assert "".join(text[start:end] for start, end in ranges) == text
    assert all(cells(text[start:end]) <= width for start, end in ranges)


def test_words_stay_whole_where_they_can():
    assert wrap("the quick brown fox", 10) == ["the quick", "brown fox"]
    assert wrap("a\n\nb", 10) == ["a", "", "b"]
    assert wrap("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


def test_scripts_without_spaces_break_between_letters_but_not_before_punctuation():
    assert wrap("中文字符，測試。", 8) == ["中文字", "符，測", "試。"]


def test_an_emoji_of_several_characters_is_never_torn():
    family = "👩‍👩‍👧"
    assert wrap(family * 3, 4) == [family * 2, family]


def test_a_hundred_thousand_letters_take_their_rows():
    assert len(wrap("x" * 100_000, 80)) == 1_250
    assert len(wrap("漢" * 100_000, 80)) == 2_500
