"""`/v1/messages` with the official client, whole and streamed."""

from typing import Any

import anthropic
import httpx2
import pytest

from qchat.tui.serve.anthropic_messages import _plain
from tests.tui.serve.running_server import WEATHER_SCHEMA, RunningServer

ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]
# this client has no parameter for the temperature any more
SETTINGS: Any = {"model": "any", "max_tokens": 200, "extra_body": {"temperature": 0}}
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}
TOOLS: Any = [{"name": "weather", "description": "Tells the weather.", "input_schema": WEATHER_SCHEMA}]


def kinds(message: anthropic.types.Message) -> list[str]:
    return [block.type for block in message.content]


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@pytest.mark.slow
def test_an_answer_comes_whole_without_a_thought_unless_it_is_asked_for(claude: anthropic.Anthropic):
    message = claude.messages.create(messages=ASKED, **SETTINGS)
    assert kinds(message) == ["text"]
    assert "Paris" in text_of(message)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    thoughtful = claude.messages.create(messages=ASKED, thinking=THINKING, **SETTINGS)
    assert kinds(thoughtful) == ["thinking", "text"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"thinking": THINKING}], ids=["answer", "thought and answer"])
def test_a_stream_adds_up_to_the_whole_message(claude: anthropic.Anthropic, options: Any):
    whole = claude.messages.create(messages=ASKED, **SETTINGS, **options)
    with claude.messages.stream(messages=ASKED, **SETTINGS, **options) as stream:
        types = [event.type for event in stream]
        message = stream.get_final_message()
    assert [block.model_dump(exclude={"id"}) for block in message.content] == [
        block.model_dump(exclude={"id"}) for block in whole.content
    ]
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens
    assert types[0] == "message_start"
    assert types[-1] == "message_stop"


@pytest.mark.slow
def test_a_thought_ends_at_its_budget(claude: anthropic.Anthropic):
    message = claude.messages.create(
        messages=ASKED, thinking={"type": "enabled", "budget_tokens": 4}, **SETTINGS
    )
    full = claude.messages.create(messages=ASKED, thinking=THINKING, **SETTINGS)
    assert kinds(message)[0] == "thinking"
    assert message.usage.output_tokens < full.usage.output_tokens


@pytest.mark.slow
def test_usage_tells_what_was_cached(claude: anthropic.Anthropic):
    system: Any = [
        {"type": "text", "text": "Be kind. " * 30, "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    first = claude.messages.create(messages=ASKED, system=system, **SETTINGS).usage
    again = claude.messages.create(messages=ASKED, system=system, **SETTINGS).usage
    assert (first.cache_read_input_tokens or 0) + first.input_tokens == again.cache_read_input_tokens
    assert again.input_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_a_stop_sequence_is_named(claude: anthropic.Anthropic, streams: bool):
    options: Any = {**SETTINGS, "messages": ASKED, "stop_sequences": [" is", "zzz"]}
    if streams:
        with claude.messages.stream(**options) as stream:
            message = stream.get_final_message()
    else:
        message = claude.messages.create(**options)
    assert text_of(message) == "The capital of France"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " is")


def test_a_limit_is_told(claude: anthropic.Anthropic):
    message = claude.messages.create(messages=ASKED, **{**SETTINGS, "max_tokens": 2})
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 2)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"thinking": THINKING}, marks=pytest.mark.slow)],
    ids=["at once", "after a thought"],
)
@pytest.mark.parametrize(
    "choice",
    ["auto", pytest.param("any", marks=pytest.mark.slow), pytest.param("tool", marks=pytest.mark.slow)],
)
def test_calls_go_out_and_their_results_come_back(
    calling_claude: anthropic.Anthropic, streams: bool, options: Any, choice: str
):
    asked: Any = [{"role": "user", "content": "The weather in Rome and in Oslo?"}]
    name = {"name": "weather"} if choice == "tool" else {}
    wanted: Any = {**SETTINGS, "tools": TOOLS, "tool_choice": {"type": choice, **name}, **options}
    if streams:
        with calling_claude.messages.stream(messages=asked, **wanted) as stream:
            message = stream.get_final_message()
    else:
        message = calling_claude.messages.create(messages=asked, **wanted)
    assert message.stop_reason == "tool_use"
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [
        ("weather", {"city": "Rome"}),
        ("weather", {"city": "Oslo"}),
    ]
    results: Any = [
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": "snow"}]},
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": "sun"},
    ]
    history: Any = [
        *asked,
        {"role": "assistant", "content": [block.model_dump() for block in message.content]},
        {"role": "user", "content": results},
    ]
    after = calling_claude.messages.create(messages=history, **SETTINGS, tools=TOOLS, **options)
    assert text_of(after) == "Sun in Rome, snow in Oslo."
    first = message.usage
    read = first.input_tokens + (first.cache_read_input_tokens or 0) + first.output_tokens
    assert (after.usage.cache_read_input_tokens or 0) >= read


@pytest.mark.slow
def test_without_parallel_use_the_message_ends_with_its_first_call(calling_claude: anthropic.Anthropic):
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    message = calling_claude.messages.create(messages=ASKED, tools=TOOLS, tool_choice=choice, **SETTINGS)
    assert kinds(message) == ["tool_use"]


def test_the_words_at_the_end_are_continued(claude: anthropic.Anthropic):
    begun: Any = [*ASKED, {"role": "assistant", "content": "The capital of France is"}]
    message = claude.messages.create(messages=begun, **SETTINGS)
    assert text_of(message).strip().startswith("Paris")


@pytest.mark.slow
def test_tokens_are_counted_as_they_are_read(claude: anthropic.Anthropic):
    counted = claude.messages.count_tokens(messages=ASKED, model="any", system="Be brief.")
    message = claude.messages.create(messages=ASKED, system="Be brief.", **SETTINGS)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_closing_the_stream_cancels_the_reply(server: RunningServer, claude: anthropic.Anthropic):
    with claude.messages.stream(messages=ASKED, thinking=THINKING, **SETTINGS) as stream:
        next(iter(stream))
    server.wait_until(lambda: not server.backend.activities)
    assert claude.messages.create(messages=ASKED, **SETTINGS).stop_reason == "end_turn"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a block of type 'image' cannot"),
        ({"messages": []}, "there are no messages"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
        ({"system": 5}, "system: Expected"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking_token_budget is -1"),
        ({"tools": [{"input_schema": {}}]}, "names its function"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "none of the given tools"),
        ({"messages": ASKED * 400}, "the context holds 2,048"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_is_one_sentence(claude: anthropic.Anthropic, fields: Any, words: str):
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        claude.messages.create(**{"messages": ASKED, **SETTINGS, **fields})
    body: Any = caught.value.body
    assert body["error"]["type"] == "invalid_request_error"
    assert "\n" not in body["error"]["message"]


def test_servers_tools_and_unknown_fields_are_ignored_and_named(http: httpx2.Client):
    body = {
        "messages": ASKED,
        "max_tokens": 1,
        "mcp_servers": [],
        "tools": [{"type": "web_search"}],
    }
    response = http.post("/v1/messages", json=body)
    assert response.status_code == 200
    assert response.headers["x-qchat-ignored"] == "mcp_servers, tools[web_search]"


def test_pictures_pass_as_data_urls_before_the_words():
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    asked = {"role": "user", "content": [{"type": "text", "text": "what?"}, picture]}
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    assert list(_plain(asked)) == [{"role": "user", "content": [url, {"type": "text", "text": "what?"}]}]


def test_a_picture_by_an_address_is_a_bad_request(claude: anthropic.Anthropic):
    picture: Any = {"type": "image", "source": {"type": "url", "url": "http://localhost/cat.png"}}
    with pytest.raises(anthropic.BadRequestError, match="nothing is fetched"):
        claude.messages.create(messages=[{"role": "user", "content": [picture]}], **SETTINGS)


def test_a_model_that_sees_nothing_says_so(claude: anthropic.Anthropic):
    picture: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    with pytest.raises(anthropic.BadRequestError, match="this model sees no pictures"):
        claude.messages.create(messages=[{"role": "user", "content": [picture]}], **SETTINGS)
