"""The events of a reply's text: calls in the answer, all of them or those before it repeats itself, and calls
at the end of a thought without an answer.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest

from qchat.core.conversation.reply_text import ReplyText
from qchat.core.events import Text, Thought, ToolUse
from qchat.core.text.tokenizer import Tokenizer
from tests.checkpoints import write_tokenizer

TOOLS: list[dict[str, Any]] = [{"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}]
CALL = "<tool_call>\n<function=look>\n<parameter=at>\nParis\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return Tokenizer.load(Path(folder))


def said(tokenizer: Tokenizer, reply: str, *, cut: bool = False) -> tuple[ReplyText, list[object]]:
    text = ReplyText(tokenizer, thinking=True, stops=(), tools=TOOLS, include_reasoning=True)
    events = [event for id in tokenizer.encode(reply) for event in text.add(id)]
    return text, [*events, *text.flush(cut=cut)]


@pytest.mark.parametrize("end", ["", "\n</think>\n\n", "\n"])
def test_a_call_that_ends_a_thought_without_an_answer_is_one(tokenizer: Tokenizer, end: str):
    text, events = said(tokenizer, f"I look.\n{CALL}{end}")
    assert [(call.name, call.arguments) for call in text.calls] == [("look", {"at": "Paris"})]
    assert events[-1] == text.calls[0]
    assert "".join(event.text for event in events if isinstance(event, Thought)) == f"I look.\n{CALL}"


@pytest.mark.parametrize(
    "reply",
    [
        f"I could say\n{CALL}\nbut I do not.",
        f"I look.\n{CALL}\n</think>\n\nIt is sunny.",
        f"I look.\n{CALL.replace('look', 'other')}",
        f"I look.\n{CALL.removesuffix('</tool_call>').removesuffix('</function>')[:-20]}",
    ],
)
def test_other_calls_in_a_thought_are_words(tokenizer: Tokenizer, reply: str):
    assert said(tokenizer, reply)[0].calls == []


def test_a_call_in_a_thought_that_was_cut_is_none(tokenizer: Tokenizer):
    assert said(tokenizer, f"I look.\n{CALL}", cut=True)[0].calls == []


def test_a_call_that_cannot_be_read_stays_text_and_is_told_of(tokenizer: Tokenizer):
    faulty = '<tool_call>{"arguments": {"at": "Paris"}}</tool_call>'
    text, events = said(tokenizer, f"Hm.</think>{faulty}")
    assert "".join(event.text for event in events if isinstance(event, Text)) == faulty
    assert text.has_unread_call
    text, events = said(tokenizer, f"Hm.</think>{CALL}")
    assert isinstance(events[-1], ToolUse)
    assert not text.has_unread_call


@pytest.mark.parametrize(
    ("limits", "cities"),
    [
        ({}, "ABAC"),
        ({"one_call": True}, "A"),
        ({"distinct_calls": True}, "AB"),
        ({"one_call": True, "distinct_calls": True}, "A"),
    ],
)
@pytest.mark.parametrize(
    "cut", ["", "<tool_call>\n<function=look>\n<parameter=at>\nOs"], ids=["whole", "cut"]
)
def test_a_reply_ends_with_the_last_call_that_may_be(
    tokenizer: Tokenizer, limits: dict[str, Any], cities: str, cut: str
):
    text = ReplyText(tokenizer, thinking=False, stops=(), tools=TOOLS, include_reasoning=True, **limits)
    ids = tokenizer.encode("\n".join([*(CALL.replace("Paris", city) for city in "ABAC"), cut]))
    events = [event for id in ids for event in text.add(id)] + list(text.flush(cut=True))
    assert [event for event in events if isinstance(event, ToolUse)] == text.calls
    assert "".join(call.arguments["at"] for call in text.calls) == cities
    assert text.stopped == bool(limits)
    assert text.text.strip() == ("" if limits else cut)
    if limits:
        shown = "\n".join(CALL.replace("Paris", city) for city in cities)
        assert tokenizer.decode(text.shown_ids(ids)) == shown
