"""`/v1/chat/completions` with the official client, whole and streamed."""

import json
import re
from typing import Any

import httpx2
import openai
import pytest

from qchat.core import Engine
from qchat.core.hub.catalog import BUILT_IN_MODEL
from qchat.core.machine.backend import mx
from tests.tui.serve.running_server import WEATHER_SCHEMA, RunningServer

PARIS = {"role": "user", "content": "What is the capital of France?"}
GREEDY: dict[str, Any] = {"model": "any", "temperature": 0}
QUICK: dict[str, Any] = {**GREEDY, "reasoning_effort": "none"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": WEATHER_SCHEMA,
    },
}


def deltas(chunks: list[Any], name: str) -> str:
    """The text of one field of all chunks."""
    found = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    return "".join(getattr(delta, name, None) or "" for delta in found)


def test_an_answer_comes_whole(client: openai.OpenAI):
    reply = client.chat.completions.create(messages=[PARIS], **GREEDY)  # pyright: ignore[reportCallIssue, reportArgumentType]
    choice = reply.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert choice.message.reasoning_content  # pyright: ignore[reportAttributeAccessIssue]
    usage = reply.usage
    assert usage and usage.completion_tokens_details and usage.prompt_tokens_details
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


@pytest.mark.slow
def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI):
    whole = client.chat.completions.create(messages=[PARIS], **GREEDY)  # pyright: ignore
    chunks = list(
        client.chat.completions.create(
            messages=[PARIS],  # pyright: ignore
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    message = whole.choices[0].message
    assert deltas(chunks, "content") == message.content
    assert deltas(chunks, "reasoning_content") == message.reasoning_content  # pyright: ignore
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage and whole.usage
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_is_left_out_of_a_stream_unless_it_is_asked_for(client: openai.OpenAI):
    chunks = list(client.chat.completions.create(messages=[PARIS], stream=True, max_tokens=2, **QUICK))  # pyright: ignore
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


@pytest.mark.parametrize(
    "off",
    [
        {"reasoning_effort": "none"},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"extra_body": {"enable_thinking": False}},
    ],
    ids=["effort", "template's variable", "field"],
)
def test_thinking_can_be_turned_off(client: openai.OpenAI, off: dict[str, Any]):
    reply = client.chat.completions.create(messages=[PARIS], **GREEDY, **off)  # pyright: ignore
    assert not hasattr(reply.choices[0].message, "reasoning_content")
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI):
    reply = client.chat.completions.create(messages=[PARIS], stop=[" is"], **QUICK)  # pyright: ignore
    assert reply.choices[0].message.content == "The capital of France"
    assert reply.choices[0].finish_reason == "stop"


def test_a_limit_ends_the_answer(client: openai.OpenAI):
    for name in ("max_tokens", "max_completion_tokens"):
        reply = client.chat.completions.create(messages=[PARIS], **QUICK, **{name: 3})  # pyright: ignore
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.completion_tokens == 3


def test_a_seed_gives_the_same_answer(client: openai.OpenAI):
    def ask() -> str:
        settings = {**QUICK, "temperature": 1.5, "seed": 5, "max_tokens": 12}
        return client.chat.completions.create(messages=[PARIS], **settings).choices[0].message.content  # pyright: ignore

    assert ask() == ask()


@pytest.mark.slow
def test_logprobs_equal_the_models_own(client: openai.OpenAI):
    settings = {**QUICK, "logprobs": True, "top_logprobs": 2, "max_tokens": 6}
    whole = client.chat.completions.create(messages=[PARIS], **settings).choices[0]  # pyright: ignore
    chunks = list(client.chat.completions.create(messages=[PARIS], stream=True, **settings))  # pyright: ignore
    streamed = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    content = whole.logprobs.content
    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in content]
    assert bytes(b for one in content for b in one.bytes).decode() == whole.message.content
    engine = Engine.load(BUILT_IN_MODEL)
    prompt = engine.template.render([PARIS], enable_thinking=False)
    ids = engine.tokenizer.encode(prompt)
    answer = engine.tokenizer.encode(whole.message.content or "")
    logits = engine.logits([*ids, *answer])
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert len(content) == len(answer)
    for place, (id, one) in enumerate(zip(answer, content, strict=True), len(ids) - 1):
        assert one.logprob == pytest.approx(float(expected[place][id]), abs=1e-3)
        assert [top.logprob for top in one.top_logprobs] == sorted(
            (top.logprob for top in one.top_logprobs), reverse=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("effort", ["none", pytest.param("medium", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "choice",
    [
        "auto",
        pytest.param("required", marks=pytest.mark.slow),
        pytest.param({"type": "function", "function": {"name": "weather"}}, marks=pytest.mark.slow),
    ],
)
def test_calls_go_out_and_their_results_come_back(
    calling: openai.OpenAI, streams: bool, effort: str, choice: Any
):
    asked = [{"role": "user", "content": "How is the weather in Rome and Oslo?"}]
    settings = {**GREEDY, "reasoning_effort": effort, "tools": [WEATHER]}
    message, usage = called(calling, asked, settings | {"tool_choice": choice}, streams)
    cities = [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]]
    assert cities == [{"city": "Rome"}, {"city": "Oslo"}]
    assert ("reasoning_content" in message) == (effort == "medium")
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": text}
        for call, text in zip(message["tool_calls"], ("sun", "snow"), strict=True)
    ]
    message.pop("reasoning_content", None)  # as most clients do
    after = calling.chat.completions.create(messages=[*asked, message, *results], **settings)  # pyright: ignore
    assert after.choices[0].message.content == "Sun in Rome, snow in Oslo."
    assert after.choices[0].finish_reason == "stop"
    assert after.usage.prompt_tokens_details.cached_tokens >= usage.total_tokens


def called(client: openai.OpenAI, asked: Any, settings: Any, streams: bool) -> tuple[dict[str, Any], Any]:
    """The message that a client keeps of a reply with calls, and its usage."""
    if not streams:
        reply = client.chat.completions.create(messages=asked, **settings)
        assert reply.choices[0].finish_reason == "tool_calls"
        return reply.choices[0].message.model_dump(exclude_none=True), reply.usage
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = list(client.chat.completions.create(messages=asked, **options, **settings))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == list(range(len(calls)))
    message = {
        "role": "assistant",
        "content": deltas(chunks, "content"),
        "tool_calls": [call.model_dump(exclude={"index"}) for call in calls],
    }
    thought = deltas(chunks, "reasoning_content")
    return message | ({"reasoning_content": thought} if thought else {}), last.usage


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_without_parallel_calls_the_reply_ends_with_its_first(calling: openai.OpenAI, streams: bool):
    asked = [{"role": "user", "content": "How is the weather in Rome and Oslo, one by one?"}]
    settings = {**QUICK, "tools": [WEATHER], "parallel_tool_calls": False}
    message, _ = called(calling, asked, settings, streams)
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [{"city": "Rome"}]


@pytest.mark.slow
def test_no_tool_is_called_where_none_may_be(client: openai.OpenAI):
    asked: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
    settings = {**QUICK, "max_tokens": 20}
    with_none = client.chat.completions.create(
        messages=asked, tools=[WEATHER], tool_choice="none", **settings
    )  # pyright: ignore
    without = client.chat.completions.create(messages=asked, **settings)
    assert with_none.usage == without.usage or with_none.usage.prompt_tokens == without.usage.prompt_tokens  # pyright: ignore


@pytest.mark.slow
def test_messages_are_taken_in_every_spelling(client: openai.OpenAI):
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "How is the weather in Rome?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "a",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
                },
                {
                    "id": "b",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "snow"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "sun"}]},
        {"role": "system", "content": "Answer in English."},
    ]
    reply = client.chat.completions.create(messages=messages, tools=[WEATHER], max_tokens=5, **QUICK)  # pyright: ignore
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.slow
def test_closing_the_stream_cancels_the_reply(server: RunningServer, client: openai.OpenAI):
    """The engine is free again at once, and what was read stays in the cache."""
    asked: Any = [{"role": "user", "content": "Count from one to a thousand. " * 30}]
    settings = {**GREEDY, "extra_body": {"stop_loops": False}}
    stream = client.chat.completions.create(messages=asked, stream=True, **settings)
    for number, _ in enumerate(stream):
        if number == 3:
            break
    stream.close()
    server.wait_until(lambda: not server.backend.activities)
    again = client.chat.completions.create(messages=asked, max_tokens=1, **GREEDY)
    assert again.usage and again.usage.prompt_tokens_details
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens


def test_what_is_unknown_is_ignored_and_named(http: httpx2.Client):
    body = {
        "messages": [PARIS],
        "max_tokens": 1,
        "logit_bias": {},
        "mood": "good",
        "tools": [{"type": "magic"}],
    }
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.headers["x-qchat-ignored"] == "logit_bias, mood, tools[magic]"
    assert "x-qchat-ignored" not in http.post(
        "/v1/chat/completions", json={"messages": [PARIS], "max_tokens": 1, "user": "me", "store": False}
    ).headers  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "there are no messages"),
        ({"messages": "hi"}, "messages: Expected array, got str"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1: role is 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text parts can be read"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}],
                    }
                ]
            },
            "this model sees no pictures|nothing is fetched",
        ),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot"}, "temperature: Expected float, got str"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
        ({"n": 2}, "n is 2"),
        ({"stop": [""]}, "none of them empty"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort is 'extreme'"),
        ({"tools": [{"type": "function", "function": {}}]}, "names its function"),
        ({"tool_choice": "sometimes"}, "tool_choice is neither"),
        ({"tool_choice": "required"}, "none of the given tools"),
        ({"response_format": {"type": "poem"}}, "response_format is no text"),
        ({"logprobs": True, "top_logprobs": 21}, "wanted at most 20"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_is_one_sentence(client: openai.OpenAI, fields: dict[str, Any], words: str):
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(**{"messages": [PARIS], "model": "any", **fields})  # pyright: ignore
    assert "\n" not in caught.value.body["message"]  # pyright: ignore


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(client: openai.OpenAI):
    asked: Any = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=asked, stream=True, **GREEDY)
    assert caught.value.code == "context_length_exceeded"
    found, limit = re.findall(r"[\d,]{4,}", str(caught.value.body["message"]))  # pyright: ignore
    assert limit == "2,048"
    assert int(found.replace(",", "")) > 3000
