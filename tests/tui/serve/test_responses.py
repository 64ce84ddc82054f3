"""`/v1/responses` with the official client: whole and streamed, stateless and by the id of the one before."""

import json
from typing import Any

import openai
import pytest

from qchat.tui.serve.errors import RequestError
from qchat.tui.serve.responses import ResponseMemory
from tests.tui.serve.running_server import WEATHER_SCHEMA

PARIS = "What is the capital of France?"
SETTINGS: Any = {"model": "any", "temperature": 0}
QUICK: Any = {**SETTINGS, "reasoning": {"effort": "none"}}
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": WEATHER_SCHEMA, "strict": False}]


def without_ids(items: Any) -> list[dict[str, Any]]:
    """The items as they were sent: the client adds fields of its own to those of a stream."""
    kept = [item.model_dump(exclude={"id", "call_id"}) for item in items]
    for part in (part for item in kept for part in item["content"]):
        part.pop("parsed", None)
    return kept


@pytest.mark.slow
def test_a_response_has_a_reasoning_item_and_a_message(client: openai.OpenAI):
    response = client.responses.create(input=PARIS, instructions="Be brief.", **SETTINGS)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert "Paris" in response.output_text
    assert response.status == "completed"
    assert response.usage
    assert response.usage.output_tokens_details.reasoning_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [SETTINGS, QUICK], ids=["with a thought", "without"])
def test_a_stream_adds_up_to_the_whole_response(client: openai.OpenAI, settings: Any):
    whole = client.responses.create(input=PARIS, **settings)
    with client.responses.stream(input=PARIS, **settings) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert without_ids(final.output) == without_ids(whole.output)
    assert final.usage and whole.usage
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")


@pytest.mark.slow
def test_the_next_response_continues_the_one_before(client: openai.OpenAI):
    first = client.responses.create(input=PARIS, **SETTINGS)
    by_id = client.responses.create(input="And of Germany?", previous_response_id=first.id, **SETTINGS)
    history: Any = [
        {"role": "user", "content": PARIS},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"role": "user", "content": "And of Germany?"},
    ]
    by_history = client.responses.create(input=history, **SETTINGS)
    assert first.usage and by_id.usage and by_history.usage
    assert by_id.usage.input_tokens == by_history.usage.input_tokens
    assert by_id.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens
    assert by_id.output_text == by_history.output_text


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "by_id", [pytest.param(False, marks=pytest.mark.slow), True], ids=["stateless", "by id"]
)
def test_calls_go_out_and_their_results_come_back(calling: openai.OpenAI, streams: bool, by_id: bool):
    asked: Any = [{"role": "user", "content": "The weather in Rome, and in Oslo?"}]
    wanted: Any = {**SETTINGS, "tools": TOOLS}
    if streams:
        with calling.responses.stream(input=asked, **wanted) as stream:
            first = stream.get_final_response()
    else:
        first = calling.responses.create(input=asked, **wanted)
    calls = [item for item in first.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Rome"}, {"city": "Oslo"}]
    results: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": text}
        for call, text in zip(calls, ("sun", "snow"), strict=True)
    ]
    if by_id:
        after = calling.responses.create(input=results, previous_response_id=first.id, **wanted)
    else:
        items: Any = [item.model_dump(exclude_none=True) for item in first.output]
        after = calling.responses.create(input=[*asked, *items, *results], **wanted)
    assert after.output_text == "Sun in Rome, snow in Oslo."
    assert after.usage and first.usage
    assert after.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_a_limit_leaves_the_response_incomplete(client: openai.OpenAI, streams: bool):
    if streams:
        events = list(client.responses.create(input=PARIS, max_output_tokens=2, stream=True, **QUICK))
        assert events[-1].type == "response.incomplete"
        response = events[-1].response
    else:
        response = client.responses.create(input=PARIS, max_output_tokens=2, **QUICK)
    assert response.status == "incomplete"
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_response_that_is_not_stored_cannot_be_continued(client: openai.OpenAI):
    first = client.responses.create(input=PARIS, store=False, max_output_tokens=2, **QUICK)
    with pytest.raises(openai.NotFoundError, match="is not remembered"):
        client.responses.create(input="Go on", previous_response_id=first.id, **QUICK)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"type": "computer_call"}], "input, item 1: a 'computer_call' cannot be read"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "only text parts can be read"),
        ([], "there are no messages"),
        ([{"type": "function_call_output", "call_id": "x", "output": 5}], "content must be text"),
        ([{"type": "function_call", "name": "f", "arguments": "{"}], "not valid JSON"),
    ],
)
def test_a_bad_input_is_one_sentence(client: openai.OpenAI, given: Any, words: str):
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(input=given, **QUICK)


@pytest.mark.parametrize("form", ["json", 1, ["json_object"], {"type": "poem"}])
def test_a_format_that_is_none_is_one_sentence(client: openai.OpenAI, form: Any):
    with pytest.raises(
        openai.BadRequestError, match="response_format is no text, json_object or json_schema"
    ):
        client.responses.create(input="Hi", text={"format": form}, **QUICK)


def test_the_memory_of_responses_is_bounded():
    memory = ResponseMemory(max_responses=3, max_characters=1000)
    message = {"role": "user", "content": "x" * 100}
    for number in range(4):
        memory.keep(str(number), [message])
    with pytest.raises(RequestError, match="'0' is not remembered"):
        memory.find("0")
    assert memory.find("1") == [message]
    memory.keep("long", [{"role": "user", "content": "x" * 800}])
    with pytest.raises(RequestError):
        memory.find("2")  # used before "1"
    memory.keep("too long", [{"role": "user", "content": "x" * 2000}])
    with pytest.raises(RequestError):
        memory.find("too long")


def test_earlier_messages_count_in_the_memory_as_long_as_a_response_holds_them():
    memory = ResponseMemory(max_characters=1000)
    history: list[dict[str, str]] = []
    for number in range(10):
        history = [*history, {"role": "user", "content": "x" * 200}]
        memory.keep(str(number), history)
    with pytest.raises(RequestError):  # more than fits, though each response added little
        memory.find("9")
