"""Histories of other programs, arranged for chat templates."""

from typing import Any

import pytest

from qchat.core.errors import TemplateError
from qchat.core.text.messages import arrange_messages

ASKED = {"role": "user", "content": "Hi"}


def call(id: str, arguments: Any = None) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments or {}}}


def calling(*ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call(id) for id in ids]}


def result(id: str, text: str = "") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text or id}


def words(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in arrange_messages(messages)]


def test_system_and_developer_messages_become_one_at_the_beginning():
    messages = [
        {"role": "system", "content": "A"},
        ASKED,
        {"role": "developer", "content": [{"type": "text", "text": "B"}]},
        {"role": "system", "content": "  "},
    ]
    assert words(messages) == [("system", "A\n\nB"), ("user", "Hi")]


def test_assistant_messages_in_a_row_become_one():
    messages = [
        ASKED,
        {"role": "assistant", "content": "Wait.", "reasoning_content": "Hm."},
        calling("a"),
        result("a"),
    ]
    _, said, answered = arrange_messages(messages)
    assert (said["content"], said["reasoning_content"]) == ("Wait.", "Hm.")
    assert [one["id"] for one in said["tool_calls"]] == ["a"]
    assert answered["content"] == "a"


def test_results_follow_their_calls_in_the_order_of_the_calls():
    messages = [ASKED, calling("a", "b"), result("b"), {"role": "user", "content": "Go on"}, result("a")]
    assert words(messages) == [
        ("user", "Hi"),
        ("assistant", ""),
        ("tool", "a"),
        ("tool", "b"),
        ("user", "Go on"),
    ]


def test_a_result_before_its_call_follows_it():
    assert [text for _, text in words([ASKED, result("a"), calling("a")])] == ["Hi", "", "a"]


def test_results_without_a_call_stay_where_they_are():
    messages = [ASKED, result("x"), calling("a"), result("a"), result("y")]
    assert [text for _, text in words(messages)] == ["Hi", "x", "", "a", "y"]


def test_ids_that_two_replies_use_belong_to_the_later_one_only_after_it():
    messages = [ASKED, calling("a"), result("a", "first"), ASKED, calling("a"), result("a", "second")]
    assert [text for _, text in words(messages)] == ["Hi", "", "first", "Hi", "", "second"]


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}], ids=["a string", "an object"])
def test_arguments_are_an_object(arguments: Any):
    message = {"role": "assistant", "content": "", "tool_calls": [call("a", arguments)]}
    arranged = arrange_messages([ASKED, message])
    assert arranged[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_an_empty_history_is_refused():
    with pytest.raises(TemplateError, match="there are no messages"):
        arrange_messages([])
