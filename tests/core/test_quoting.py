"""What others wrote, as a message may repeat it: bounded, on one line, without control characters."""

import pytest

from qchat.core.errors import ModelError
from qchat.core.quoting import MAX_SENTENCE, printable, quote_value


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        (4, "4"),
        ("four", "'four'"),
        ([4, "x"], "[4, 'x']"),
        (True, "True"),
        ([10**400], "[100000000000000000000000000...]"),
    ],
)
def test_a_value_is_quoted_whatever_it_is(value: object, quoted: str):
    assert quote_value(value) == quoted


def test_a_number_that_repr_refuses_is_described():
    assert quote_value(1 << 40_000) == "a number of about 12,000 digits"


def test_a_large_value_is_cut():
    for value in ("x" * 10**6, ["x"] * 10**6, {"x" * 10**6: "y" * 10**6}, [[[[[[1]]]]]]):
        assert len(quote_value(value)) <= 60


def test_a_name_loses_its_control_characters_and_its_length():
    assert printable("x\x1b[31my") == r"'x\x1b[31my'"
    assert len(printable("x" * 10**6)) == 120


def test_a_message_is_bounded_and_keeps_both_ends():
    text = str(ModelError("the beginning " + "x" * 10**7 + " the end"))
    assert len(text) < MAX_SENTENCE + 10
    assert text.startswith("the beginning") and text.endswith("the end")


def test_a_message_never_holds_a_control_character():
    assert str(ModelError("a\x1b]0;title\x07b\u202ec\r")) == r"a\x1b]0;title\x07b\u202ec\r"
