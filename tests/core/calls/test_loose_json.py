"""JSON as models write it: well-formed JSON is read exactly, usual faults are forgiven, nothing else is."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.calls.loose_json import Unfinished, read_loosely

atoms = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
documents = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200)
@given(documents, st.sampled_from([None, 1]), st.booleans())
def test_well_formed_json_is_read_exactly(document: Any, indent: int | None, ascii: bool):
    text = json.dumps(document, indent=indent, ensure_ascii=ascii)
    for complete in (False, True):
        value, end = read_loosely(text, complete=complete)
        assert json.dumps(value) == json.dumps(document)
        assert end == len(text)


@settings(max_examples=200)
@given(st.text(alphabet="{}[]()\"',:\\ \n/*#ntu1a-.") | st.text())
def test_any_text_is_read_or_refused(text: str):
    try:
        _, end = read_loosely(text)
    except ValueError:
        return
    assert 0 < end <= len(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': 'it\\'s', b: True,}", {"a": "it's", "b": True}),
        ('{"a": "He said "hello" to me"}', {"a": 'He said "hello" to me'}),
        ('{"a": "x", "b": "He said "hi", then left"}', {"a": "x", "b": 'He said "hi", then left'}),
        ('{"a": "1\n2\t3"}', {"a": "1\n2\t3"}),
        (r'{"a": "C:\Users\d+\."}', {"a": r"C:\Users\d+\."}),
        ('{"a": {"b": [1, 2}', {"a": {"b": [1, 2]}}),
        ('{"a": """one "two" three"""}', {"a": 'one "two" three'}),
        ("[1 2,, 3]", [1, 2, 3]),
        ('{"a": 1 // one\n, /* two */ "b": (None, -2.5e1)}', {"a": 1, "b": [None, -25.0]}),
        ('{"a": "b"\n "c": "d"}', {"a": "b", "c": "d"}),
        ('{"a": "http://x#y"}', {"a": "http://x#y"}),
    ],
)
def test_the_usual_faults_are_forgiven(text: str, value: Any):
    assert read_loosely(text)[0] == value


@pytest.mark.parametrize(
    "text", ["", "{1, 2}", "NaN", "x", "{a}", '{"a"}', "1e999", "9" * 5000, "[" * 9000, "__a__"]
)
def test_what_is_no_json_is_refused(text: str):
    with pytest.raises(ValueError):
        read_loosely(text)


@pytest.mark.parametrize("text", ['{"a": "b', '["x" y]', "'", '{"a": """x"'])
def test_an_open_string_is_told_from_other_faults(text: str):
    with pytest.raises(Unfinished):
        read_loosely(text)


def test_a_value_that_must_be_complete_needs_its_brackets():
    assert read_loosely('{"a": [1')[0] == {"a": [1]}
    with pytest.raises(Unfinished):
        read_loosely('{"a": [1', complete=True)
